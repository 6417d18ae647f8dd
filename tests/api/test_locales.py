"""The English texts that translators start from are those of the nodes, and the host hands them to its front end."""

from __future__ import annotations

import json

from tools.make_locales import FILE, as_text, escaped, node_texts


def test_the_file_is_up_to_date(client):
    info = client.server.request("/object_info")
    assert FILE.read_text(encoding="utf-8") == as_text(node_texts(info)), "run `python -m tools.make_locales`"


def test_the_host_serves_it(client):
    served = client.server.request("/i18n")["en"]["nodeDefs"]
    own = {name: entry for name, entry in served.items() if name.startswith("AdaState")}
    assert own == json.loads(FILE.read_text(encoding="utf-8"))


def test_characters_of_the_message_format_are_escaped():
    assert escaped("a[5s] | b {x} @c 5%") == "a[5s] {'|'} b {'{'}x{'}'} {'@'}c 5{'%'}"
