"""Keeps the two largest of every four weights along the input dimension (2:4 sparsity).

Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
"""

from prunebench.pruning.targets import plan_n_of_m
from prunebench.selection.scores import Values

TITLE = "Magnitude, 2:4"
KIND = "weights"
CONTROL = True
SPARSITIES = (0.5,)
NOTES = "Half of each matrix; 2:4 kernels exist on CUDA only, so it brings no speed on a CPU."
PAPER = "arXiv 2104.08378"
BIBTEX = """@article{mishra2021accelerating,
  title = {Accelerating Sparse Deep Neural Networks},
  author = {Mishra, Asit and Latorre, Jorge Albericio and Pool, Jeff and Stosic, Darko and
            Stosic, Dusan and Venkatesh, Ganesh and Yu, Chong and Micikevicius, Paulius},
  journal = {arXiv preprint arXiv:2104.08378},
  year = {2021}
}"""


def select(context):
    return plan_n_of_m(Values(context.weights(), lambda weight: weight.detach().abs()), 2, 4)
