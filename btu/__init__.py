"""Backdoor Token Unlearning, and what it is compared with, as a library.

The modules are light to import: a function that needs torch or transformers imports them when it
runs, so that planning a sweep of thousands of cells does not load them.
"""

__version__ = "0.1.0"
