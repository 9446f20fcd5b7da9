"""What a user can get wrong in a conversion."""


class ConvertError(ValueError):
    """A conversion that cannot be done as asked; the message says why and what to do instead."""
