"""Optional packages: whether they are installed, and which extra of mtr-lab brings them."""

from importlib.util import find_spec

from mtr_lab.errors import UserError


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported, which may take seconds."""
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # hidden from the interpreter, or a stub without a spec
        return False


def require(package: str, extra: str, reason: str) -> None:
    """Raise a ``UserError`` with the command that installs an extra, unless its package is installed.

    Args:
        package: the module that is imported.
        extra: of mtr-lab.
        reason: what needs it, the start of the message.
    """
    if not installed(package):
        raise UserError(f"{reason} needs the package {package}: pip install 'mtr-lab[{extra}]'.")
