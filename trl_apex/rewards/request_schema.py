"""The JSON that travels to and from the reward server, as its OpenAPI document publishes it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RESERVED = {"prompts", "completions", "images", "completion_ids", "trainer_state", "log_extra", "log_metric", "self"}


class TensorForm(BaseModel):
    """Type and shape of the raw bytes in the part `tensor`: little-endian, row by row."""

    model_config = ConfigDict(extra="forbid")
    dtype: Literal["uint8", "float32"]
    shape: list[int] = Field(min_length=4, max_length=4, description="[B, 3, H, W]")


class RewardMetadata(BaseModel):
    """The part `metadata` of a request."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[str] = Field(min_length=1, description="One prompt per image.")
    columns: dict[str, list[Any]] = Field(
        default_factory=dict, description="Further columns of the dataset, one value per image."
    )
    tensor: TensorForm | None = Field(
        default=None, description="Form of the part `tensor`; absent where images come as files."
    )

    @model_validator(mode="after")
    def _fits(self) -> "RewardMetadata":
        for key, values in self.columns.items():
            if key in RESERVED:
                raise ValueError(f"the column name {key!r} is reserved")
            if len(values) != len(self.prompts):
                raise ValueError(f"column {key!r} must hold {len(self.prompts)} values, found {len(values)}")
        if self.tensor is not None and self.tensor.shape[0] != len(self.prompts):
            raise ValueError(f"`tensor` must hold {len(self.prompts)} images, found {self.tensor.shape[0]}")
        return self


class RewardAnswer(BaseModel):
    """The rewards of a request."""

    rewards: list[float | None] = Field(description="One per image; null where there is none.")
    errors: list[str | None] = Field(description="Why a reward is null, if something broke.")
    seconds: float = Field(description="Time of the batch that the request was scored in.")


class RewardState(BaseModel):
    """One reward of the server."""

    name: str
    model: str = Field(description="Class or function, with the settings that it shows.")
    state: str = Field(description="`ready`, `loading`, or `failed: CAUSE`.")
    range: str = ""
    weights_licence: str = ""


class Health(BaseModel):
    """Whether the server can score."""

    status: Literal["ready", "loading", "failed"]
    version: str
    protocol: int = Field(description="Version of the wire format.")
    rewards: list[RewardState]


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str


def request_body(metadata_schema: str) -> dict[str, Any]:
    """The request body's OpenAPI description.

    Args:
        metadata_schema (`str`): Reference to the schema of the part `metadata`.

    Returns:
        `dict[str, Any]`.
    """
    binary = {"type": "string", "format": "binary"}
    properties = {
        "metadata": {"$ref": metadata_schema},
        "images": {"type": "array", "items": binary, "description": "PNG or WebP files, one per prompt."},
        "tensor": binary | {"description": "Raw bytes of all images, in the form that `metadata.tensor` declares."},
    }
    schema = {"type": "object", "required": ["metadata"], "properties": properties}
    encoding = {
        "metadata": {"contentType": "application/json"},
        "images": {"contentType": "image/png, image/webp"},
        "tensor": {"contentType": "application/octet-stream"},
    }
    return {"required": True, "content": {"multipart/form-data": {"schema": schema, "encoding": encoding}}}
