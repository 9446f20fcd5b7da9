"""What a user can get wrong in a conversion."""

from xlstm_io.errors import UserError


class ConvertError(UserError):
    """A conversion that cannot be done as asked; the message says why and what to do instead."""
