import json

import pytest

from forerun.errors import SourceError, UnknownModelError
from forerun.export.catalog import CATALOG, find_entry, load_catalog
from forerun.export.fetch import _FETCHERS


def test_the_catalog_has_the_promised_models():
    catalog = load_catalog()
    assert list(catalog) == ["smollm2-135m", "gemma3-270m"]
    smollm, gemma = catalog.values()
    assert smollm.licence == "Apache-2.0" and smollm.terms_path is None
    assert gemma.terms_path.read_text("utf-8").startswith("Gemma Terms of Use")
    assert "base model" in gemma.note
    assert all(entry.sources[0].type == "wheels" for entry in catalog.values())


def test_tables_are_complete():
    types = {source.type for entry in load_catalog().values() for source in entry.sources}
    assert types <= set(_FETCHERS)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownModelError, match="smollm2-135m, gemma3-270m"):
        find_entry("gpt-5")


def changed(change):
    data = json.loads(CATALOG.read_text("utf-8"))
    change(data["models"][0])
    return data


BAD = {
    "unknown key": lambda m: m.update(colour="red"),
    "missing key": lambda m: m.pop("licence"),
    "name is a path": lambda m: m.update(name="../x"),
    "file is a path": lambda m: m["files"][0].update(name="../x"),
    "no files": lambda m: m.update(files=[]),
    "hash": lambda m: m["files"][0].update(sha256="00"),
    "size": lambda m: m["files"][0].update(bytes=-1),
    "size is text": lambda m: m["files"][0].update(bytes="1"),
    "source type": lambda m: m["sources"][1].update(type="ftp"),
    "no sources": lambda m: m.update(sources=[]),
    "parts do not add up": lambda m: m["sources"][0]["parts"][0].update(bytes=5),
    "part without hash": lambda m: m["sources"][0]["parts"][0].update(sha256=""),
    "variant": lambda m: m.update(default_variant="int3"),
    "terms": lambda m: m.update(terms="nowhere.txt"),
    "twice": lambda m: m.update(name="gemma3-270m"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_catalog_is_refused(tmp_path, case):
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps(changed(BAD[case])))
    with pytest.raises(SourceError, match=r"catalog"):
        load_catalog(path)
