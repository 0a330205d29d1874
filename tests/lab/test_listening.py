"""A server ends by SIGTERM, and leaves the process as it was; requests of other sites are foreign."""

import signal

import pytest

from blockwright.lab.listening import Site, until_signal


def test_signal_is_as_before_even_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), until_signal():
        signal.raise_signal(signal.SIGTERM)  # uvicorn does, once all has ended
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def headers(host, origin=None, site=None):
    found = {"host": host, "origin": origin, "sec-fetch-site": site}
    return {name: value for name, value in found.items() if value is not None}


HERE = "127.0.0.1:80"
OPEN, NAMED = Site(80, loopback=False), Site(80, allowed=["Models.example"])


FOREIGN = [
    (Site(80), headers("evil.example:80", "http://evil.example:80")),
    (Site(80), headers("")),
    (Site(80), headers("127.0.0.1:81")),
    (Site(80), headers("127.0.0.1:80.evil.example")),
    (Site(80), headers(HERE, "http://127.0.0.1:81")),
    (Site(80), headers(HERE, "http://localhost:80")),
    (Site(80), headers(HERE, "null")),
    (Site(80), headers(HERE, f"https://{HERE}")),
    (Site(80), headers(HERE, site="cross-site")),
    (OPEN, headers("10.0.0.1:80", "http://evil.example")),
    (NAMED, headers("models.example.evil.example")),
    (NAMED, headers("models.example", "https://evil.example")),
    (NAMED, headers(HERE, "https://notmodels.example")),
    (Site(80, loopback=False, allowed=["models.example"]), headers("evil.example", "http://evil.example")),
]
OWN = [
    (Site(80), headers(HERE)),
    (Site(80), headers("LocalHost:80", "http://localhost:80", "same-origin")),
    (Site(80), headers("[::1]:80")),
    (OPEN, headers("anything", "https://anything")),
    (NAMED, headers("models.example")),
    (NAMED, headers("models.example:8443", "https://models.example:8443")),
    (NAMED, headers(HERE, "https://models.example")),  # a proxy that writes the host again
    (NAMED, headers(HERE)),
]


def test_requests_of_other_sites_are_foreign_and_of_programs_and_the_own_page_are_not():
    assert not [sent for site, sent in FOREIGN if not site.foreign(sent, "/v1/models")]
    assert not [sent for site, sent in OWN if site.foreign(sent, "/v1/models")]


def test_a_link_of_another_site_leads_to_the_page_alone():
    link = headers(HERE, site="cross-site")
    assert not Site(80).foreign(link, "/") and Site(80).foreign(link, "/health")
