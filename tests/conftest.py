import os
import sys
from pathlib import Path

# one thread: the problems are tiny, bits repeat, and a busy machine does not starve spinning threads
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from omegaconf import OmegaConf

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
OmegaConf.register_new_resolver("project_root", lambda: str(HERE.parent), replace=True)
