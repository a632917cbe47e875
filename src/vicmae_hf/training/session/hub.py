"""The repository on the Hub to which a run uploads its output folder."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from ...command_line import one_line
from ...errors import InputError
from ...settings import ArgumentsError
from ..arguments import TrainingArguments
from .output_folder import HOLDER_FILE, LOCK_FILE


# Requests to the Hub raise these: refusals and files, unreachable servers, wrong names, failed transfers.
HUB_ERRORS = (OSError, HTTPError, ValueError, RuntimeError)


class UploadError(InputError):
    """The output folder could not be uploaded; the message says why, and how to upload it later."""


def create_repository(arguments: TrainingArguments) -> None:
    """
    Creates the repository, or finds it, and sets `arguments.hub_model_id` to its full name.

    Raises:
        ArgumentsError: if the Hub can't be reached, or does not let this user write there.
    """
    hub = HfApi()
    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    try:
        private = True if arguments.private else None  # else as the organisation has it
        arguments.hub_model_id = hub.create_repo(name, private=private, exist_ok=True).repo_id
        # Creating passes if the repository exists, also where this user may only read. Better now than after days.
        hub.auth_check(arguments.hub_model_id, write=True)
        is_public = arguments.private and not hub.model_info(arguments.hub_model_id).private
    except HUB_ERRORS as error:
        raise ArgumentsError(
            f"--push_to_hub: the repository {name} on {hub.endpoint} cannot be written to ({one_line(error)}). If the "
            "network works, log in with `hf auth login` and a token that may write, or choose another --hub_model_id."
        ) from error
    if is_public:
        raise ArgumentsError(
            f"--private: the repository {arguments.hub_model_id} is there already, and public. Make it private in its "
            "settings on the Hub, or choose another --hub_model_id."
        )


def upload(arguments: TrainingArguments) -> None:
    # Checkpoints hold the optimizer: three times the model, of use only for going on with this run.
    left_out = ["checkpoint-*/**", ".partial-*/**", LOCK_FILE, HOLDER_FILE]
    try:
        HfApi().upload_folder(
            repo_id=arguments.hub_model_id,
            folder_path=arguments.output_dir,
            ignore_patterns=left_out,
            commit_message="End of training",
        )
    except HUB_ERRORS as error:
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in left_out)
        raise UploadError(
            f"The training is done and saved in {arguments.output_dir}, but it was not uploaded ({one_line(error)}). "
            f"To upload it: hf upload {arguments.hub_model_id} {arguments.output_dir} {excluded}"
        ) from error
