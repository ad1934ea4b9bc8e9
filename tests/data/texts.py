"""Small folders of text and configs that read them."""

import pathlib

from sparse_lm import config as configs


def write_folder(folder: pathlib.Path, documents: int = 60, word: str = "sea") -> pathlib.Path:
    """A folder with one .txt file per document; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (folder / f"{i:03}.txt").write_text(f"Document {i} of the {word}. " * (1 + i % 7))
    return folder


def config(cache: pathlib.Path, *sources: str, **data) -> configs.Config:
    made = configs.Config()
    made.data = configs.Data(sources=sources, **({"length": 16} | data))
    made.model.vocabulary = 300
    made.cache = str(cache)
    made.logging.progress = False
    return configs.resolve(made)
