"""Write docs/configuration.md: every key of a recipe with its type, default and meaning, as the code says them.

With --check nothing is written, and a page that is not what the code says ends with exit code 1.

Exit codes: 0 done, 1 --check found the page out of date, 2 bad input.

Examples:

    python tools/document_config.py
    python tools/document_config.py --check
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from sra_jax import cli, files
from sra_jax.config import reference
from sra_jax.errors import RunError

FLAGS = flags.FLAGS
PAGE = ROOT / "docs" / "configuration.md"

flags.DEFINE_bool("check", False, "Only say whether the page is current.")


def main() -> None:
    """Write or compare."""
    text = reference.markdown()
    if not FLAGS.check:
        files.write_text(PAGE, text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        raise RunError(f"docs/{PAGE.name} is not what the code says: run python tools/document_config.py")


if __name__ == "__main__":
    cli.run(main)
