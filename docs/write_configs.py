"""Write the files of configs/: every parameter at its default, with its help. Run it after a change to
parameters.py; what was edited in these files is lost.

python docs/write_configs.py
"""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from parameters import CONFIG_DIR, CONFIG_FILES, PARTS, format_settings, specs  # noqa: E402


def config_files() -> dict[Path, str]:
    """The text of each file, by its path in the project."""
    files = {}
    for part, name in CONFIG_FILES.items():
        own = [spec for spec in specs().values() if spec.part == part]
        about = f"{PARTS[part].__doc__}\nEdit these defaults; flags such as {own[0].flag} override them."
        files[Path(CONFIG_DIR, name)] = format_settings(
            name, about, {spec.name: spec.default for spec in own}
        )
    return files


if __name__ == "__main__":
    for path, text in config_files().items():
        (PROJECT / path).write_text(text, encoding="utf-8")
