"""One thread per test process: two xdist workers on two cores, and results that do not depend on it."""

import torch

torch.set_num_threads(1)
