"""Engram: associative memory. `Client` talks to a server, or runs the same engine in process on a folder.

Importing this package is light: the engine and torch are imported only by `Client(path=...)`.
"""

from engram.client import Client, Collection
from engram.replies import Recall, StoreReply
from service.errors import EngramError

__all__ = ["Client", "Collection", "EngramError", "Recall", "StoreReply"]
