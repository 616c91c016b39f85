"""The one failure every layer shares: something real that this model does not model."""

__all__ = ("Unmodelled",)


class Unmodelled(Exception):
    """Stops the run and names what is missing; never turned into an errno or a status code.

    docs/support.md lists what is modelled, for which profile, and where to ask for more.
    """
