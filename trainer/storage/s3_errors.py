"""What went wrong with an S3 service, in words that help and quote no credential."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from botocore import exceptions as aws
from s3transfer.exceptions import RetriesExceededError

from pipelines.proxies import proxy_hint
from trainer.storage.errors import StoreError, StoreUnreachable

_CREDENTIALS = (
    "give a valid key by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the AWS profile in "
    "store.profile, or the machine's role"
)
_NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.TokenRetrievalError,
    aws.SSOError,
)
_NO_ANSWER = (
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.IncompleteReadError,
    RetriesExceededError,
)

CAUSES: Mapping[str, str] = {
    "NoSuchBucket": "the bucket does not exist; create it or correct the name",
    "InvalidAccessKeyId": f"the access key is unknown there; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the access key or its secret is wrong; {_CREDENTIALS}",
    "ExpiredToken": f"the credentials have expired; {_CREDENTIALS}",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "AccessDenied": "these credentials may not do this; grant s3:GetObject, s3:PutObject, "
    "s3:DeleteObject and s3:ListBucket, or use others",
    "403": f"access is refused; {_CREDENTIALS}, and grant it this bucket, or read a public one "
    "with store.anonymous=true",
    "PermanentRedirect": "the bucket is in another region; set store.region",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set store.region",
    "NotImplemented": "the service lacks an operation that safe checkpoints need (PUT with "
    "If-None-Match); update it or use another",
    "QuotaExceeded": "the quota is used up; raise it or delete something",
    "XMinioStorageFull": "its disks are full; free space",
}
"""Cause and remedy for the codes of an answer."""

_ABORT_ALONE = (
    "; nothing but unfinished uploads is affected, which stay and take space until a lifecycle "
    "rule of the bucket (AbortIncompleteMultipartUpload) removes them"
)
_NO_ABORT = f"the service does not list or abort unfinished uploads{_ABORT_ALONE}"
CAUSES_OF_ABORT: Mapping[str, str] = {
    **CAUSES,
    "AccessDenied": "these credentials may not do this; grant s3:ListBucketMultipartUploads and "
    f"s3:AbortMultipartUpload, or use others{_ABORT_ALONE}",
    "NotImplemented": _NO_ABORT,
    "MethodNotAllowed": _NO_ABORT,
}
"""The same where unfinished uploads are removed, which takes other rights and operations."""


@contextmanager
def explain_errors(
    what: str, causes: Mapping[str, str], *, endpoint: str | None = None
) -> Iterator[None]:
    """Turn the errors of boto3 into ours; their own text may quote a credential.

    Args:
        what: What is done, where.
        causes: Cause and remedy for the codes of an answer.
        endpoint: Address of the service; None is AWS.

    Raises:
        StoreError: The service refuses.
        StoreUnreachable: It does not answer, or fails.
    """
    try:
        yield
    except _NO_CREDENTIALS as error:
        raise StoreError(
            f"Cannot {what}: no usable credentials were found; {_CREDENTIALS}, or read a public "
            "bucket with store.anonymous=true."
        ) from error
    except _NO_ANSWER as error:
        if "Invalid header value" in str(error):
            raise StoreError(
                f"Cannot {what}: the access key or session token contains a line break or another "
                "character that cannot be sent; set it anew."
            ) from None  # the cause quotes them
        raise StoreUnreachable(
            f"Cannot {what}: the service does not answer ({type(error).__name__}); check that it "
            "runs, and the address in store.endpoint_url or S3_ENDPOINT_URL."
            f"{proxy_hint(endpoint)}"
        ) from error
    except aws.ClientError as error:
        code, status = _code(error), http_status(error)
        if status >= 500 and code not in causes:
            raise StoreUnreachable(
                f"Cannot {what}: the service fails or is overloaded (HTTP {status} {code}) after "
                f"all retries; look at its state, or raise store.retries.{proxy_hint(endpoint)}"
            ) from error
        cause = causes.get(code, "look the code up in the service's manual")
        # An answer that is not the service's own has the status for its code.
        hint = "" if code in causes and not code.isdigit() else proxy_hint(endpoint)
        raise StoreError(
            f"Cannot {what}: refused with HTTP {status} {code}: {cause}.{hint}"
        ) from error
    except aws.BotoCoreError as error:
        raise StoreError(
            f"Cannot {what}: {type(error).__name__}: {error}; check the settings in store and the "
            "AWS environment variables."
        ) from error


def http_status(error: aws.ClientError) -> int:
    """Return the status of the answer, 0 if there was none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_conflict(error: BaseException) -> bool:
    """Tell whether another write of the same key is under way, and which one wins is open."""
    return isinstance(error, aws.ClientError) and http_status(error) == 409


def is_broken_off(error: BaseException) -> bool:
    """Tell whether an answer broke off."""
    return isinstance(
        error, aws.IncompleteReadError | aws.ResponseStreamingError | aws.ReadTimeoutError
    )


def deletes_one_by_one(error: aws.ClientError) -> bool:
    """Tell whether a service refuses to delete many objects in one request, whatever they are.

    Some lack the operation; some know it only with a Content-MD5, which boto3 no longer sends.
    """
    return http_status(error) in (405, 501) or _code(error) in (
        "MethodNotAllowed",
        "NotImplemented",
        "MissingContentMD5",
        "InvalidDigest",
        "BadDigest",
    )


def raise_refused(answer: Mapping[str, Any]) -> None:
    """Raise the first refusal in an answer that names those of single objects.

    Raises:
        ClientError: An object was not deleted.
    """
    for refusal in answer.get("Errors", ()):
        failed = refusal.get("Code") in ("InternalError", "SlowDown", "ServiceUnavailable")
        response: Any = {
            "Error": refusal,
            "ResponseMetadata": {"HTTPStatusCode": 503 if failed else 403},
        }
        raise aws.ClientError(response, "DeleteObjects")


def _code(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))
