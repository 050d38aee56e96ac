"""The public documents: what callers write in HTTP bodies and in ``apply -f`` files.

A spec holds the caller's fields. The rooms' stored documents add what the server knows.
Fields that the server adds are ignored on input (``SERVER_FIELDS``); any other unknown field is refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictStr,
    ValidationInfo,
    model_validator,
)

from .documents import DIGEST, STORED, Part, Ref, Time
from .errors import Invalid
from .signatures import SAMPLE_BYTES, small

MODEL_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9\-._]{0,254}$")
IMAGE_NAME = re.compile(r"^[a-z0-9](?:[a-z0-9]|[.\-](?=[a-z0-9])){1,30}[a-z0-9]$")
DEPLOYMENT_NAME = re.compile(r"^[a-z](?:[a-z0-9]|-(?=[a-z0-9])){1,30}[a-z0-9]$")
ALIAS_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9\-._]{0,254}$")
SAMPLING_KEY = re.compile(
    r"^(?:prediction_id|request_id|trace_id|input:.{1,255}|header:[a-z0-9][a-z0-9_.\-]{0,126})$")
MEMORY = re.compile(r"^[1-9][0-9]*(?:Ki|Mi|Gi|Ti|k|M|G|T)?$")
SERVER_FIELDS = frozenset({
    "kind", "id", "workspace", "version", "generation", "created", "updated", "phase", "conditions",
    "observed_generation", "digest", "endpoints", "replicas_ready", "size", "reason", "lock_digest",
    "log_digest", "aliases", "models", "image_digest", "serving", "blockers",
    "file_signature", "signatures", "samples", "served_as",
})
FRAMEWORKS = ("scikit-learn", "onnx", "lightgbm", "xgboost", "pytorch", "tensorflow", "mlflow", "custom")


def _matches(pattern: re.Pattern[str], rule: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.match(value) or "\n" in value:
            raise ValueError(rule)
        return value

    return AfterValidator(check)


ModelName = Annotated[StrictStr, _matches(
    MODEL_NAME, "a model name is 1-255 letters, digits, '-', '.', '_', and starts with a letter or digit")]
ImageName = Annotated[StrictStr, _matches(
    IMAGE_NAME, "an image name is 3-32 lower-case letters, digits, '-' or '.', starts and ends with a letter "
    "or digit, and has no two of '-' '.' side by side")]
DeploymentName = Annotated[StrictStr, _matches(
    DEPLOYMENT_NAME, "a deployment name is 3-32 lower-case letters, digits or '-', starts with a letter, "
    "ends with a letter or digit, and has no '--'")]
SamplingKey = Annotated[StrictStr, _matches(
    SAMPLING_KEY, "a sampling key is prediction_id, request_id, trace_id, input:NAME or header:NAME in lower case")]
Digest = Annotated[StrictStr, _matches(DIGEST, "a digest is sha256: and 64 lower-case hexadecimal digits")]
TextMap = Annotated[
    dict[Annotated[StrictStr, Field(min_length=1, max_length=255)], Annotated[StrictStr, Field(max_length=4096)]],
    Field(default_factory=dict, max_length=256),
]


def _reference(value: str) -> str:
    try:
        Ref.parse(value)
    except Invalid as exc:
        raise ValueError(exc.message) from exc  # one problem among all of a request
    return value


Reference = Annotated[StrictStr, AfterValidator(_reference)]


def _drop_server_fields(data: Any, own: frozenset[str]) -> Any:
    if isinstance(data, dict):
        return {k: v for k, v in data.items() if k in own or k not in SERVER_FIELDS}
    return data


class Spec(BaseModel):
    """Base of what callers write: unknown fields are refused, fields that the server adds are ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _ignore_server_fields(cls, data: Any, info: ValidationInfo) -> Any:
        return data if info.context is STORED else _drop_server_fields(data, frozenset(cls.model_fields))


class SpecPart(Spec, Part):
    """A part of a spec that documents keep as it is. Whoever reads it from a caller says ``extra="forbid"``, for by
    itself it keeps what a newer version added."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})


class Dataset(SpecPart):
    """Lineage: a dataset that a model was made from."""

    name: StrictStr
    uri: StrictStr | None = None
    digest: StrictStr | None = None


class ModelSpec(Spec):
    """``kind: Model``. ``artifact`` must have been uploaded (``PUT /v1/artifacts/{digest}``)."""

    name: ModelName
    artifact: Digest
    unpack: bool = False
    framework: Literal[
        "scikit-learn", "onnx", "lightgbm", "xgboost", "pytorch", "tensorflow", "mlflow", "custom"
    ] | None = None
    framework_version: StrictStr | None = None
    filename: Annotated[StrictStr, Field(pattern=r"^[^/\x00-\x1f]{1,255}$")] | None = None
    """The file's own name (``model.joblib``), so that it keeps it inside an image."""
    trusted: bool = False
    """The caller says that loading this file may run code it holds (pickle, joblib) and that it is theirs."""
    tags: TextMap
    properties: TextMap
    description: Annotated[StrictStr, Field(max_length=8192)] = ""
    signature: dict[str, Any] | None = None
    """What it takes and gives (``core/signatures.py``); absent, what its file says itself."""
    sample: dict[str, Any] | list[Any] | None = None
    """An input that it takes, as a body of ``/score``; absent, the input example of an MLflow folder."""
    parent: Reference | None = None
    run: StrictStr | None = None
    experiment: StrictStr | None = None
    datasets: list[Dataset] = Field(default_factory=list)

    @model_validator(mode="after")
    def _framework_first(self) -> ModelSpec:
        if self.framework_version is not None and self.framework is None:
            raise ValueError("framework_version needs framework")
        if self.sample is not None and not small(self.sample):
            raise ValueError(f"sample: a sample has at most {SAMPLE_BYTES} bytes of JSON; a row or two are enough")
        return self


class ImageSpec(Spec):
    """``kind: Image``. Without ``score`` the models' own flavour answers; without ``base`` (or
    ``dockerfile``) it runs on ``local``."""

    name: ImageName
    models: Annotated[list[Reference], Field(max_length=64)] = Field(default_factory=list)
    score: Digest | None = None
    requirements: list[Annotated[StrictStr, Field(min_length=1, max_length=1024)]] = Field(default_factory=list)
    constraints: list[Annotated[StrictStr, Field(min_length=1, max_length=1024)]] = Field(default_factory=list)
    """Bounds on what the requirements bring along; they install nothing."""
    lock: Digest | None = None
    python: Annotated[StrictStr, Field(pattern=r"^3\.[0-9]{1,2}$")] | None = None
    platform: Literal["linux/amd64", "linux/arm64"] | None = None
    base: StrictStr | None = None
    dockerfile: Digest | None = None
    """In place of ``base``: a folder with a ``Dockerfile`` at its top, whose image the image stands on."""
    env: TextMap
    tags: TextMap
    properties: TextMap
    description: Annotated[StrictStr, Field(max_length=8192)] = ""
    auto_delete: bool = False
    timeout_s: Annotated[int, Field(ge=1, le=86_400)] = 1800
    """A build that takes longer, in seconds, fails."""
    onnx: bool = False
    """Serve small scikit-learn models as ONNX where that answers the same on their samples and rows about them."""


class Traffic(Spec):
    """A share of a deployment's calls; weights are relative."""

    image: Reference
    weight: Annotated[int, Field(ge=0, le=1000)]


class Autoscale(Spec):
    """Replicas follow load between ``min`` and ``max``."""

    min: Annotated[int, Field(ge=1, le=1000)] = 1
    max: Annotated[int, Field(ge=1, le=1000)] = 10
    target_utilization: Annotated[int, Field(ge=1, le=100)] = 70


def _memory(value: Any) -> Any:
    if isinstance(value, str) and not MEMORY.match(value):
        raise ValueError("memory is a number with Ki, Mi, Gi, Ti, k, M, G or T: 512Mi")
    return value


class Resources(SpecPart):
    """For one replica. ``cpu`` in cores, ``memory`` in bytes with a suffix."""

    cpu: Annotated[float, Field(gt=0, le=1024)] | None = None
    memory: Annotated[StrictStr, BeforeValidator(_memory)] | None = None
    gpu: Annotated[int, Field(ge=0, le=64)] = 0


class Capture(SpecPart):
    """What of the traffic is kept.

    ``sampling`` is the share of successful calls; failures are always kept. ``sampling_key`` says what the lot is drawn
    by, so that calls with the same key are all kept or none: ``prediction_id`` (each call by itself), ``request_id``,
    ``trace_id``, ``input:NAME`` (the values of an input) or ``header:NAME`` (a gRPC metadata key or HTTP header, in
    lower case). A call without the key is drawn by itself. ``redact`` names inputs, outputs, fields of JSON bodies and
    columns of collectors whose values are taken out before anything is written. ``sync: always`` waits for the disk
    before the answer leaves: it survives a loss of power. ``spool_bytes`` caps what waits to be shipped (1 GiB).
    """

    enabled: bool = False
    sampling: Annotated[float, Field(ge=0, le=1)] = 1.0
    sampling_key: SamplingKey = "prediction_id"
    redact: Annotated[list[Annotated[StrictStr, Field(min_length=1, max_length=255)]], Field(max_length=256)] = []
    sync: Literal["never", "always"] = "never"
    on_pressure: Literal["drop", "reject", "block"] = "drop"
    spool_bytes: Annotated[int, Field(ge=2**20, le=2**50)] | None = None
    retention_days: Annotated[int, Field(ge=1, le=3650)] = 30


class Limits(SpecPart):
    """What one replica accepts. Times in milliseconds, sizes in bytes."""

    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 60_000
    max_queue: Annotated[int, Field(ge=1, le=100_000)] = 512
    max_batch_rows: Annotated[int, Field(ge=1, le=65_536)] = 64
    max_message_bytes: Annotated[int, Field(ge=1024, le=2**31 - 1)] = 67_108_864


class Secret(SpecPart):
    """Where the target finds a secret when a replica starts; exactly one source."""

    env: StrictStr | None = None
    file: StrictStr | None = None
    kubernetes: StrictStr | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Secret:
        if sum(v is not None for v in (self.env, self.file, self.kubernetes)) != 1:
            raise ValueError("a secret names exactly one source: env, file or kubernetes")
        return self


class DeploymentSpec(Spec):
    """``kind: Deployment``. ``image`` or ``traffic``; ``replicas`` or ``autoscale``."""

    name: DeploymentName
    image: Reference | None = None
    traffic: list[Traffic] = Field(default_factory=list)
    target: Annotated[StrictStr, Field(min_length=1, max_length=64)] = "local"
    replicas: Annotated[int, Field(ge=1, le=1000, strict=True)] | None = None
    autoscale: Autoscale | None = None
    resources: Resources = Field(default_factory=Resources)
    capture: Capture = Field(default_factory=Capture)
    limits: Limits = Field(default_factory=Limits)
    env: TextMap
    secrets: dict[Annotated[StrictStr, Field(min_length=1)], Secret] = Field(default_factory=dict)
    tags: TextMap
    description: Annotated[StrictStr, Field(max_length=8192)] = ""
    progress_deadline_s: Annotated[int, Field(ge=1, le=86_400)] = 600

    @model_validator(mode="after")
    def _one_of_each(self) -> DeploymentSpec:
        if (self.image is None) == (not self.traffic):
            raise ValueError("give image or traffic, one of the two")
        if self.replicas is not None and self.autoscale is not None:
            raise ValueError("give replicas or autoscale, not both")
        return self


class Condition(Part):
    """One aspect of a document's state, as Kubernetes writes it."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    time: Time
