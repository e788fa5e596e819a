"""Documents of files that lie elsewhere: each is copied into the cache once, and read there."""

import hashlib
from collections.abc import Iterator
from functools import partial

from sat_lightning.data.remote import expand_remote, identify, keep_local_copy
from sat_lightning.data.sources import Document, FileSource, SourceOptions, register_source

#: What `fsspec` opens; for another of its protocols register one more.
SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hdfs", "ftp", "sftp", "memory", "file")


class RemoteDocuments:
    """The documents of a URL, read like a local file of its extension.

    Args:
        scheme: of the URL.
        path: the rest of it; with `*`, all that match.
        options: how files are read.
    """

    num_bytes = 0

    def __init__(self, scheme: str, path: str, options: SourceOptions) -> None:
        self.name = f"{scheme}://{path}"
        self.options = options
        self.urls = expand_remote(self.name)

    def __iter__(self) -> Iterator[Document]:
        for url in self.urls:
            yield from FileSource(url, [keep_local_copy(url, self.options.cache_dir)], self.options)

    def fingerprint(self) -> str:
        """Digest of what the files hold now, as their file system tells, and of the options."""
        parts = [self.options.fingerprint(), *map(identify, self.urls)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


for _scheme in SCHEMES:
    register_source(f"{_scheme}://")(partial(RemoteDocuments, _scheme))
