"""Engram: associative memory. `Client` talks to a server, or runs the same engine in process on a folder;
`AsyncClient` is the same, awaited.

Importing this package is light: the engine and torch are imported only where a client is given a `path`.
"""

from engram.async_client import AsyncClient, AsyncCollection
from engram.client import Client, Collection
from engram.replies import Recall, StoreReply
from service.errors import EngramError

__all__ = ["AsyncClient", "AsyncCollection", "Client", "Collection", "EngramError", "Recall", "StoreReply"]
