"""Networks that run, layer by layer, on a picture or a signal: `python -m bench network`.

To be read in this order: inputs, profile, maps, pictures; then what a user sees: tables, command. Networks
and their runs are in bench/networks.
"""
