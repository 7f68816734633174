"""What may leave this machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectivex.runtime.redact import Private, Redactor, keyed_hash

REDACT = Redactor(
    Private(
        hosts=("gpu17.cluster.internal",),
        users=("jdoe", "root"),
        homes=("/srv/people/jdoe", "/root"),
        secrets=("correct horse battery",),
    )
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/people/jdoe/x/lib.so", "~/x/lib.so"),
        ("/home/other/x", "~/x"),
        ("/Users/other", "~"),
        ("on gpu17.cluster.internal: failed", "on <host>: failed"),
        ("gpu17 is up", "<host> is up"),
        ("/scratch/jdoe_tmp/a", "/scratch/<user>_tmp/a"),
        ("listening on 10.1.2.3:29500", "listening on <address>:29500"),
        ("peer fe80::1ff:fe23:4567:890a refused", "peer <address> refused"),
        ("fe80::1: refused", "<address>: refused"),
        ("log_10.1.2.3_a", "log_<address>_a"),
        ("mac 0c:42:a1:00:00:01.", "mac <address>."),
        ("from ip-10-0-0-7.ec2.internal", "from <host>"),
        ("mail someone@example.org", "mail <address>"),
        ("id AKIAIOSFODNN7EXAMPLE here", "id <secret> here"),
        ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "<secret>"),
        ("url?token=abc123", "url?token=<secret>"),
        ("say correct horse battery twice", "say <secret> twice"),
    ],
)
def test_private_text_is_replaced(text, expected):
    """Home folders, hosts, users, addresses and secrets are replaced by what kind of thing they were."""
    assert REDACT.text(text) == expected
    assert REDACT.touches(text)


@pytest.mark.parametrize(
    "text",
    [
        "2.27.3",
        "libibverbs.so.1.14.50.0",
        "127.0.0.1:29500",
        "::1",
        "std::vector and c10::cuda",
        "12:30:59",
        "/root/x",
        "all_reduce jdoesnt",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "mlx5_0:1,mlx5_1:1",
        "Linux-6.8.0-45-generic-x86_64-with-glibc2.39",
        "site-packages/nvidia/nccl/lib/libnccl.so.2",
    ],
)
def test_what_names_nobody_is_left_alone(text):
    """Versions, commits, loopback, C++ names and root are no secrets."""
    assert text == REDACT.text(text)
    assert not REDACT.touches(text)


def test_a_short_name_must_stand_alone_and_a_long_one_need_not():
    """A user called "al" does not eat "all_reduce"; "longname" is found inside a word, in any case."""
    redact = Redactor(Private(users=("al", "longname")))

    assert redact.text("al ran all_reduce in xLongName7") == "<user> ran all_reduce in x<user>7"


def test_generic_names_and_addresses_are_no_words():
    """MASTER_ADDR=127.0.0.1 must not make "127" a private word, nor a user "nvidia" the folder nvidia."""
    redact = Redactor(Private(hosts=("127.0.0.1", "localhost"), users=("nvidia",)))

    assert redact.text("nvidia/lib at 127 on localhost") == "nvidia/lib at 127 on localhost"


def test_a_json_tree_keeps_its_keys_and_numbers():
    """Only string values are scrubbed."""
    tree = {"jdoe": ["gpu17", 1, None, {"a": ("10.0.0.9",)}]}

    assert REDACT.tree(tree) == {"jdoe": ["<host>", 1, None, {"a": ["<address>"]}]}


def test_hashes_depend_on_key_purpose_and_text():
    """12 hex digits that change with each of the three: no table of hosts fits two installations."""
    one = keyed_hash("k", "host", "gpu17")
    others = {
        keyed_hash("K", "host", "gpu17"),
        keyed_hash("k", "boot", "gpu17"),
        keyed_hash("k", "host", "gpu18"),
    }

    assert len(one) == 12
    assert int(one, 16) >= 0
    assert one not in others
    assert len(others) == 3


@given(st.ip_addresses(), st.sampled_from(["at {} now", "{}:29500", "[{}]", "={},", "{}"]))
def test_every_address_but_loopback_and_any_is_replaced(address, frame):
    """Any IPv4 or IPv6 address in any of these surroundings."""
    text = frame.format(address)
    if address.version == 6 and frame == "{}:29500":  # ambiguous: that is another address, or none
        return
    kept = address.is_loopback or address.is_unspecified

    assert (str(address) in REDACT.text(text)) == kept
