"""Models from an S3 bucket, through obstore (Rust's object_store; Apache-2.0 or MIT). An optional package.

Reads alone: GetObject with a range, tied to the entity tag of what was begun.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from dicomnode.errors import OperatorError
from dicomnode.settings import Cloud
from dicomnode.sync.http import confidential, read_token
from dicomnode.sync.source import CHUNK_BYTES, Again, Answer, Unfit

NOT_FOUND, FORBIDDEN, UNKNOWN = 404, 403, 401
"""As which it is told, as HTTP would, that there is no such object, that it may not be read, or who asks is unknown.

Without s3:ListBucket a bucket answers 403 for both. Where the end of the chain of roots is asked for
(N+1.root.json), python-tuf takes either for the end; for any other file it stays an error.
"""


class S3Source:
    """Proxies come from the environment as for HTTPS; ``cloud.ca_file`` is trusted beside the system's authorities.

    Raises OperatorError when the package is missing or the settings cannot be used.
    """

    def __init__(self, cloud: Cloud) -> None:
        try:
            import obstore
            import obstore.exceptions
            from obstore.store import S3Store
        except ImportError:
            raise OperatorError(
                "open the model bucket",
                "the package obstore is not installed",
                "Run: .venv/bin/pip install --require-hashes -r scripts/requirements/s3.txt",
            ) from None
        self._library, self._errors, self._store = obstore, obstore.exceptions, S3Store
        self._cloud, self._settings = cloud, cloud.repository

    def _open_store(self, bucket: str) -> Any:
        settings, timeout = self._settings, timedelta(seconds=self._cloud.timeout_seconds)
        config: dict[str, Any] = {"region": settings.s3_region}
        if settings.s3_endpoint:
            config["endpoint"] = settings.s3_endpoint
        if settings.s3_access_key_file:
            config["access_key_id"] = read_token(settings.s3_access_key_file)
            config["secret_access_key"] = read_token(settings.s3_secret_key_file)
        client: dict[str, Any] = {
            "connect_timeout": min(timedelta(seconds=30), timeout),
            "read_timeout": timeout,
            "timeout": timedelta(days=1),  # of the whole object; the caller has deadlines of its own
            "allow_http": settings.s3_endpoint.startswith("http:") and confidential(settings.s3_endpoint),
        }
        if self._cloud.ca_file:
            client["root_certificate"] = self._cloud.ca_file.read_bytes()
        retry = {"max_retries": 0}  # what is tried again, and when, is in the rows
        return self._store(bucket, config=config, client_options=client, retry_config=retry)

    @asynccontextmanager
    async def open(self, url: str, start: int = 0, etag: str = "") -> AsyncIterator[Answer]:
        parts = urlsplit(url)
        options: dict[str, Any] = {}
        if start:
            options["range"] = {"offset": start}
            if etag:
                options["if_match"] = etag
        try:
            store = self._open_store(parts.netloc)
            result = await self._library.get_async(store, parts.path.lstrip("/"), options=options)
            chunks = self._chunks(result.stream(min_chunk_size=CHUNK_BYTES))
            yield Answer(start, int(result.meta["size"]), str(result.meta["e_tag"] or ""), chunks)
        except self._errors.PreconditionError:
            raise Unfit("the object changed between two attempts; it is loaded anew", 0.0) from None
        except (self._errors.NotFoundError, FileNotFoundError):
            raise Again("the bucket does not have it", None, NOT_FOUND) from None
        except self._errors.PermissionDeniedError:
            raise Again(
                f"the bucket refuses to show it (403): the credentials need s3:GetObject on {parts.netloc}/*, and"
                f" s3:ListBucket on {parts.netloc} to be told of what is not there",
                None,
                FORBIDDEN,
            ) from None
        except self._errors.UnauthenticatedError:
            cause = "the bucket does not know the credentials (401): check cloud.repository.s3_access_key_file"
            raise Again(cause, None, UNKNOWN) from None
        except self._errors.BaseError as error:
            raise Again(f"the bucket answered with {type(error).__name__}") from None

    async def _chunks(self, stream: Any) -> AsyncIterator[bytes]:
        async for chunk in stream:
            yield bytes(chunk)
