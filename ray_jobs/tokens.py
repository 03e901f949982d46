"""The token of the Ray that a command starts for itself."""

import os
import secrets

from ray._private.authentication.authentication_token_setup import _enable_token_auth, ensure_token_if_auth_enabled


def use_a_token() -> None:
    """Turn token authentication on and have a token, as `ray.init` would, but without its three lines of warning.

    `RAY_AUTH_MODE` decides where it is set. Where no token can be kept in the user's home (there is none in many
    containers), one is made for this process and those that it starts.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        _enable_token_auth()
    before = os.umask(0o077)  # Ray leaves a new token readable for every user
    try:
        ensure_token_if_auth_enabled()
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    finally:
        os.umask(before)
