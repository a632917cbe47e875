import subprocess
import sys

import pytest
from launching import EXAMPLES


SCRIPTS = [path for path in sorted(EXAMPLES.glob("*/*.py")) if "__main__" in path.read_text(encoding="utf-8")]


# The other tests run them where everything is imported already.
@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_by_itself_and_from_anywhere(path, tmp_path):
    process = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: ")
