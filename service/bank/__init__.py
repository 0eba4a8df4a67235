"""Banks: a collection's patterns in memory, and the search over them. No database, no network.

From outside: a `Bank` is made with a `Layout`, takes `Rows`, and gives a `View`, whose `search` gives `Found`.
"""

from service.bank.bank import Bank
from service.bank.layout import NEVER, Layout, Rows, SpaceLayout
from service.bank.view import Found, View

__all__ = ["NEVER", "Bank", "Found", "Layout", "Rows", "SpaceLayout", "View"]
