import sys
from pathlib import Path

# Modules of tests are imported by path; what they share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))
