import threading

from cluster import ray_nodes


def test_nodes_are_asked_all_at_once(monkeypatch):
    """One that is silent takes seconds, and forty of them take no longer."""
    together = threading.Barrier(40)

    def silent(address):
        together.wait()
        return address == "lives"

    monkeypatch.setattr(ray_nodes, "is_reachable", silent)
    addresses = ["lives", *(f"10.0.0.{n}:1" for n in range(39))]
    assert ray_nodes.are_reachable(addresses) == [True] + [False] * 39
    assert ray_nodes.are_reachable([]) == []


def test_several_nodes_are_avoided_by_one_selector_without_spaces():
    """Ray takes a space for a part of the id behind it: the real thing is in the lab's test."""
    assert ray_nodes.avoiding({"b", "a"}) == {"ray.io/node-id": "!in(a,b)"}
    assert ray_nodes.avoiding(()) == {}
