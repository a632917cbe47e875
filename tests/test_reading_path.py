"""One path to read: what pretraining is made of stays small enough to be read in one sitting."""

import subprocess
import sys


MAX_MODULES = 25
MAX_LINES = 5_000

# In a process of its own, as the tests have imported more. Packages themselves (`__init__.py`) hold next to nothing.
PROGRAM = """
import sys
import vicmae_hf.pretraining.pretraining
for name, module in sorted(sys.modules.items()):
    if name.startswith("vicmae_hf.") and not hasattr(module, "__path__"):
        print(name, len(open(module.__file__, encoding="utf-8").read().splitlines()))
"""


def test_pretraining_can_be_read_in_one_sitting():
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = {name: int(count) for name, count in (line.split() for line in process.stdout.splitlines())}
    # From the video file to the loss, none is left out by an import that hides.
    for name in ("data.media.video", "data.sources.sources", "data.samples.pairs", "modeling_vicmae", "training.loop"):
        assert f"vicmae_hf.{name}" in lines
    assert len(lines) <= MAX_MODULES, sorted(lines)
    assert sum(lines.values()) <= MAX_LINES, lines
