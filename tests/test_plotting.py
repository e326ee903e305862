"""matplotlib, as it is imported by all that draws."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import PROJECT


def test_an_account_without_a_home_sees_no_word_of_matplotlib_and_keeps_no_temporary_folder(tmp_path):
    code = (
        "import os, sys, numpy as np, utils_aim.pictures, utils_alg1.report.pictures as pictures\n"
        "from utils_alg1.base.summaries import Embedding\n"
        "pictures.draw_attention(np.ones((1, 1, 2, 2)), 'title', 'ab')\n"
        "utils_aim.pictures.draw_embedding(Embedding('e', np.eye(2, dtype=np.float32), ['a', 'b']))\n"
        "os._exit(0)\n"  # as a run ends
    )
    nowhere = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), "/proc/nobody")
    environment = os.environ | nowhere | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    environment.pop("MPLCONFIGDIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
