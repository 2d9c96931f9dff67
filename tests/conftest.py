import os
import sys
from pathlib import Path

# one thread: the problems are tiny, bits repeat, and a busy machine does not starve spinning threads
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parent))
