"""Reads frame stores and Parquet files in object storage (s3://, gs://, hf://), with `datasets` and fsspec."""

import glob
import json
from dataclasses import dataclass

import datasets
import fsspec
from huggingface_hub.errors import OfflineModeIsEnabled

from .frame_store import FrameStoreSource
from .sources import STORE_FILE, DataSourceError, MediaSource, SourceSettings
from .tables import source_of


# The extra of this package that brings what a protocol needs; huggingface_hub brings hf://.
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_ENDPOINT_URL for another service than "
    "Amazon's; FSSPEC_S3_ANON=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`",
    "hf": "HF_TOKEN or `hf auth login`",
}


@dataclass(frozen=True)
class RemoteFiles:
    """
    The files of a table.

    Args:
        name: URL, as the user gave it.
        format: "arrow" or "parquet".
        urls: one for each file, which is a shard of a stream.
        num_rows: of each file; None where nothing says so.
    """

    name: str
    format: str
    urls: list[str]
    num_rows: list[int] | None = None

    def load(self, streaming: bool = False, **options) -> datasets.Dataset | datasets.IterableDataset:
        """Loads the table with options of `load_dataset`; unless it is streamed, into the cache of `datasets`."""
        files = {"train": [glob.escape(url) for url in self.urls]}  # `datasets` takes them for patterns
        try:
            return datasets.load_dataset(self.format, data_files=files, split="train", streaming=streaming, **options)
        except OfflineModeIsEnabled as error:
            raise DataSourceError(
                f"{self.name}: cannot be copied to the disk while HF_HUB_OFFLINE is set. Unset it, or read with "
                "--streaming."
            ) from error
        # Any exception: each service's libraries have their own.
        except Exception as error:
            raise storage_error(self.name, error) from error


def open_remote(name: str, settings: SourceSettings) -> MediaSource | FrameStoreSource:
    """Opens a frame store, a Parquet file or a folder of them by its URL. Raises a DataSourceError as `find_files`."""
    return source_of(name, find_files(name).load(), settings)


def find_files(name: str) -> RemoteFiles:
    """
    Finds the files of a frame store or another saved table, or the Parquet files at and below a URL.

    Raises:
        DataSourceError: if there are none, a store is not whole, or the storage cannot be read.
    """
    try:
        file_system, path = fsspec.core.url_to_fs(name)
        paths = sorted(file_system.find(path))
        root = path.rstrip("/")
        if f"{root}/state.json" in paths:
            return find_shards(name, file_system, root, paths)
    except DataSourceError:
        raise
    except Exception as error:
        raise storage_error(name, error) from error
    if f"{root}/{STORE_FILE}" in paths:
        raise DataSourceError(f"{name}: the frame store is not finished, or its state.json was not copied.")
    if f"{root}/dataset_dict.json" in paths:
        raise DataSourceError(f"{name}: expected one split, got a folder of them: name the folder of one.")
    parquet = [file_system.unstrip_protocol(file) for file in paths if file.endswith(".parquet")]
    if not parquet:
        raise DataSourceError(
            f"{name}: no frame store and no Parquet files found among {len(paths)} files. Videos and images are not "
            "read from object storage: pack them with pack_frames.py and copy the store there."
        )
    return RemoteFiles(name, "parquet", parquet)


def find_shards(name: str, file_system: fsspec.AbstractFileSystem, root: str, paths: list[str]) -> RemoteFiles:
    """Lists the shards that state.json names, with their numbers of rows if they are those of a frame store."""
    state = json.loads(file_system.cat_file(f"{root}/state.json"))
    shards = [f"{root}/{entry['filename']}" for entry in state["_data_files"]]
    missing = sorted(set(shards) - set(paths))
    if missing:
        raise DataSourceError(
            f"{name}: {len(missing)} of {len(shards)} shards are missing, the first: {missing[0].removeprefix(root)}. "
            "Copy the folder once more."
        )
    records = [shard.removesuffix(".arrow") + ".json" for shard in shards]
    num_rows = None
    if set(records) <= set(paths):
        contents = file_system.cat(records)
        num_rows = [json.loads(contents[record])["num_rows"] for record in records]
    return RemoteFiles(name, "arrow", [file_system.unstrip_protocol(shard) for shard in shards], num_rows)


def storage_error(name: str, error: Exception) -> DataSourceError:
    """Says what to do about an error of fsspec, or of a library under it."""
    protocol = name.partition("://")[0]
    reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, ImportError) and protocol in EXTRAS:
        return DataSourceError(f'{name}: {protocol}:// needs pip install "vicmae-hf[{EXTRAS[protocol]}]" ({reason}).')
    credentials = CREDENTIALS.get(protocol)
    advice = "Check the URL" + (f" and the credentials ({credentials})" if credentials else "")
    return DataSourceError(f"{name}: cannot be read ({reason}). {advice}.")
