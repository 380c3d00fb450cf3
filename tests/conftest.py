"""Shared by the tests: the repository on the path, offline, and tiny backbones of several families."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MOVIELENS = ROOT.parent / "shared" / "data" / "movielens-small"
