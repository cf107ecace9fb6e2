import sys
from pathlib import Path

# Helpers shared by all test folders (tiny.py, fakes.py) are imported by name.
sys.path.insert(0, str(Path(__file__).parent))
