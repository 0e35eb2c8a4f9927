"""Zeroes the smallest weights of the whole network, wherever they are."""

from prunebench.selection.scores import Values

TITLE = "Magnitude, unstructured"
KIND = "weights"
CONTROL = True
NOTES = "Masks bring no speed on dense kernels; MACs and latency are those of the dense model."
PAPER = "arXiv 1506.02626"
BIBTEX = """@inproceedings{han2015learning,
  title = {Learning both Weights and Connections for Efficient Neural Networks},
  author = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2015}
}"""


def select(context):
    return context.plan_weights(Values(context.weights(), lambda weight: weight.detach().abs()))
