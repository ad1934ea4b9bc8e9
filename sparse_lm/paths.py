"""Paths that a user gives, all made in the same way."""

from etils import epath

from sparse_lm.errors import UserError

STORES = ("gs", "s3", "az")  # what etils.epath reads and writes


def user_path(path: epath.PathLike) -> epath.Path:
    """The absolute path: `~` is the home, a relative path starts in the working folder, a store's URL stays.

    Raises `UserError` for a URL of another kind, and for `~` where there is no home.
    """
    text = str(path)
    if in_object_store(text):
        scheme = text.partition("://")[0]
        if scheme not in STORES:
            raise UserError(f"{text}: {scheme}:// is no store that can be used; {', '.join(STORES)} and folders are")
        return epath.Path(text)
    expanded = epath.Path(text).expanduser()
    if str(expanded).startswith("~"):
        raise UserError(f"{text}: there is no such home folder; set HOME, or write the path out")
    return expanded.absolute()


def in_object_store(path: epath.PathLike) -> bool:
    return "://" in str(path)
