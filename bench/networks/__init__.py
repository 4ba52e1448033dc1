"""The networks of CNN courses: one definition gives the convolutions to benchmark, a summary, and a run."""

from bench.networks.catalogue import NETWORKS, get_network
from bench.networks.fuse import fuse
from bench.networks.model import Model, Step
from bench.networks.network import Layer, Network, Row, print_summary
from bench.networks.nodes import ConvLayer
from bench.networks.weights import draw_weights, load_weights

__all__ = [
    "NETWORKS",
    "ConvLayer",
    "Layer",
    "Model",
    "Network",
    "Row",
    "Step",
    "draw_weights",
    "fuse",
    "get_network",
    "load_weights",
    "print_summary",
]
