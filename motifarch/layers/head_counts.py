"""How many heads of each kind an attention layer has, and how wide they are."""


def noise_heads_of(num_heads: int, ratio: int | None, num_noise_heads: int | None) -> int:
    """Noise heads, from one of the two ways to say them.

    Args:
        num_heads: signal and noise heads together.
        ratio: signal heads a noise head.
        num_noise_heads: noise heads.

    Raises:
        ValueError: neither or both are given, or num_heads is no multiple of ratio + 1.
    """
    if num_noise_heads is not None and ratio is None:
        return num_noise_heads
    if num_noise_heads is not None or ratio is None:
        raise ValueError(
            f"ratio={ratio} and num_noise_heads={num_noise_heads}; give one of the two: ratio=4 is a noise head for "
            "each four signal heads"
        )
    if ratio < 1:
        raise ValueError(f"ratio={ratio}; it must be 1 or more signal heads a noise head")
    group = ratio + 1
    if num_heads < group or num_heads % group:
        below = num_heads // group * group
        nearest = f"the nearest are {below} and {below + group}" if below else f"the nearest is {group}"
        raise ValueError(
            f"num_heads={num_heads} (signal and noise) cannot be cut into groups of {ratio} signal heads and a noise "
            f"head; it must be a multiple of ratio + 1 = {group}: {nearest}"
        )
    return num_heads // group


def default_head_dim(hidden_size: int, heads: int) -> int:
    """Width of a head where ``heads`` of them share the hidden size.

    Raises:
        ValueError: they cannot.
    """
    if heads < 1 or hidden_size % heads:
        raise ValueError(
            f"hidden_size={hidden_size} is not a multiple of {heads} heads, among which it is divided by default; "
            "give head_dim"
        )
    return hidden_size // heads


def check_heads(num_heads: int, num_noise_heads: int, num_kv_heads: int, *, paired_keys: bool) -> None:
    """Raise ValueError unless the heads divide: signal heads by noise heads, noise heads by
    key/value heads.

    Args:
        num_heads: signal and noise heads together.
        num_noise_heads: noise heads.
        num_kv_heads: key/value heads; with ``paired_keys`` they come in pairs (k1, k2).
        paired_keys: whether signal and noise have keys of their own.
    """
    if num_noise_heads < 1 or num_heads <= num_noise_heads or num_heads % num_noise_heads:
        raise ValueError(
            f"num_heads={num_heads} (signal and noise) cannot be cut into num_noise_heads={num_noise_heads} "
            "equal groups of signal heads and a noise head; it must be a multiple of num_noise_heads, at least twice it"
        )
    if paired_keys and num_kv_heads % 2:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must be even: key heads come in pairs, one for signal and one for noise"
        )
    key_heads = num_kv_heads // 2 if paired_keys else num_kv_heads
    if key_heads < 1 or num_noise_heads % key_heads:
        raise ValueError(
            f"num_noise_heads={num_noise_heads} is not a multiple of the {key_heads} key/value "
            f"{'pairs' if paired_keys else 'heads'} that num_kv_heads={num_kv_heads} gives; "
            "choose num_kv_heads so that it is"
        )
