"""Puts the repository root on the path, and says where the golden numbers are."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
