"""Backdoor Token Unlearning and the parts it is measured with, as a library.

The modules are light to import: whatever needs torch or transformers imports them when it
runs, so that planning a sweep of thousands of cells does not pay for them.
"""

__version__ = "0.1.0"
