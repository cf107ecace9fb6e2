"""Every typed error of forerun, in one place so that each room can raise it.

An error says what was given, what is allowed and what to do, in one line.
`exit_code` is what the command line returns: 2 for what the user can put right, 1 for failures.
"""

from __future__ import annotations


class ForerunError(Exception):
    """Base of all errors that forerun raises on purpose."""

    exit_code = 1


class UserError(ForerunError):
    """Something that was given is wrong, and the user can put it right."""

    exit_code = 2


class OptionError(UserError):
    """An option has a value outside its range, or contradicts another."""


class PromptError(UserError):
    """The prompt is empty or is not text."""


class ContextLimitError(UserError):
    """Prompt and answer do not fit into the context; raised before any compute."""


class BusyError(UserError):
    """A generation is still running on the same model; close or cancel it first."""


class TemplateError(UserError):
    """A chat template is broken, or tries something a template may not do."""


class UnknownModelError(UserError):
    """A model is neither in the catalog nor a bundle on this machine."""


class TermsError(UserError):
    """The licence of a model must be accepted before it is pulled."""


class BundleError(UserError):
    """A bundle is damaged, incomplete, of another version or tries to leave its folder."""


class SourceError(UserError):
    """A file of source weights (GGUF, safetensors, config.json, tokenizer) is malformed."""


class UnsupportedError(UserError):
    """The model or the option is well-formed, but nothing here can run it."""


class DeviceError(UserError):
    """A device is not here, or cannot run what was asked of it."""


class SpaceError(UserError):
    """Disk or memory is too small for what was asked."""


class DrafterError(ForerunError):
    """A drafter failed in the middle of an answer; the session stays usable."""


class DownloadError(ForerunError):
    """No source of a model could be fetched, or what came had another hash."""


class ExportMismatch(ForerunError):
    """An exported graph computes something else than its source.

    Args:
        tensor: name of the tensor that differs.
        error: largest absolute difference that was found.
        bound: largest difference that is allowed.
        where: what was compared (prompt length, reference).
    """

    def __init__(self, tensor: str, error: float, bound: float, where: str = "") -> None:
        self.tensor, self.error, self.bound, self.where = tensor, error, bound, where
        place = f" ({where})" if where else ""
        super().__init__(
            f"{tensor} differs from the reference by {error:.3g}, allowed is {bound:.3g}{place}; "
            "the bundle was not written"
        )
