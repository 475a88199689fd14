"""Tests of what qlora either does or says that it does not support."""


def result_or_refusal(call, *words):
    """The result of ``call`` (True if it returns None), or None if it raised an error that contains one of ``words``.

    The words say what is not supported. Any other exception is a failure.
    """
    try:
        result = call()
        return True if result is None else result
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        if not any(word.lower() in str(error).lower() for word in words):
            raise
        return None
