"""The networks of CNN courses: one definition gives the convolutions to benchmark and a summary by layer."""

from bench.networks.catalogue import NETWORKS, get_network
from bench.networks.network import Layer, Network, Row, print_summary
from bench.networks.nodes import ConvLayer

__all__ = ["NETWORKS", "ConvLayer", "Layer", "Network", "Row", "get_network", "print_summary"]
