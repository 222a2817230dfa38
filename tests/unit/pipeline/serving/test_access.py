"""Clients are told apart by key and address, however they write the header."""

from pipeline.serving.http.access import Access


def test_spellings_of_the_header_are_one_client_and_its_name_has_no_key():
    access = Access((b"secret-1", b"secret-2"))
    spellings = ("Bearer secret-1", "bearer secret-1", "BEARER   secret-1 ", "BeaRer secret-1")
    names = {access.client("10.0.0.1", spelling) for spelling in spellings}
    assert len(names) == 1 and "secret" not in names.pop()
    others = {("10.0.0.1", "Bearer secret-2"), ("10.0.0.2", "Bearer secret-1"), ("10.0.0.1", spellings[0])}
    assert len({access.client(*other) for other in others}) == 3


def test_without_keys_a_header_makes_no_further_client():
    assert Access().client("10.0.0.1", "Bearer 1") == Access().client("10.0.0.1", "")
