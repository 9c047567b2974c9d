"""What can go wrong for a user: one small exception tree.

A message of these exceptions is one line that says what is wrong, where, and what to do. The command line prints it
and exits with 1; `--debug` shows the traceback. Anything else that escapes is a mistake of ours.
"""


class Llama2Error(Exception):
    """Base of everything a user can cause and fix."""


class ConfigError(Llama2Error):
    """A model's hyperparameters contradict each other."""


class CheckpointError(Llama2Error):
    """A model file is damaged, hostile, or of a kind that is not supported."""


class ParityError(Llama2Error):
    """A model that was written is not the one that was read, or is further from it than its format allows."""


class TokenizerError(Llama2Error):
    """A vocabulary is damaged or unsupported, or text or ids cannot be converted."""


class DialogError(Llama2Error):
    """A list of messages breaks the rules of the chat format."""


class TemplateError(Llama2Error):
    """A chat template is malformed, forbidden, or exceeds its limits."""


class HubError(Llama2Error):
    """A model's name cannot be turned into a verified local file."""


class RequestError(Llama2Error):
    """A generation request has a value out of range."""


class ContextError(RequestError):
    """Prompt and answer do not fit the model's context; nothing is ever truncated silently."""


class EngineError(Llama2Error):
    """The forward pass cannot run, or its result is unusable (for example not a number)."""


class PlanError(Llama2Error):
    """What is to be planned is not known, does not go together, or is out of range."""


class RecipeError(Llama2Error):
    """A recipe has a setting that is unknown, missing, or of no use, or is not TOML."""


class DataError(Llama2Error):
    """Documents, a corpus built of them, or a tokenizer for them are missing, damaged, or do not go together."""


class RunError(Llama2Error):
    """A training run cannot begin, continue or go on."""


class EvaluationError(Llama2Error):
    """A task or its data is missing or damaged, or cannot be evaluated here."""


class ClassifierError(Llama2Error):
    """A classifier of texts is not there, damaged, or cannot be trained."""


class SafetyError(Llama2Error):
    """A guard, a key, a watermark or a signature is missing, of the wrong kind, or does not hold."""
