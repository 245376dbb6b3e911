import psutil

from cluster.process_group import interface_of, leave, listen


def test_any_loopback_address_is_the_loopback_interface():
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert interface_of("127.0.0.9") == loopback


def test_every_address_of_this_machine_is_found():
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if not entry.address.startswith("127."):
                assert interface_of(entry.address) == name


def test_an_address_of_another_machine_has_no_interface():
    assert interface_of("192.0.2.200") is None


def test_the_rendezvous_listens_on_the_given_address_alone():
    with listen("127.0.0.1") as listener:
        host, port = listener.getsockname()
    assert host == "127.0.0.1"
    assert port > 0


def test_leaving_without_having_joined_does_nothing():
    leave()
