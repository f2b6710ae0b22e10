"""Where Python packages come from, as pip sees it, for a machine whose python3 has no pip."""

import base64
import configparser
import html
import netrc
import os
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path


class PackageIndex:
    """The indexes and folders that pip's settings name, with their certificates, proxy and logins."""

    def __init__(self):
        files = ["/etc/xdg/pip/pip.conf", "/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf",
                 f"{sys.prefix}/pip.conf", os.environ.get("PIP_CONFIG_FILE", "")]
        self.files = configparser.RawConfigParser(strict=False)
        self.files.read([os.path.expanduser(name) for name in files if name], encoding="utf-8")
        self.indexes = self.get("index-url", "https://pypi.org/simple").split()
        self.indexes += self.get("extra-index-url").split()
        if self.get("no-index").lower() in ("1", "true", "yes", "on"):
            self.indexes = []
        self.folders = [Path(item[7:] if item.startswith("file://") else item)
                        for item in self.get("find-links").split() if "://" not in item or item.startswith("file://")]
        self.logins = {}
        certificates = self.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or None
        handlers = [urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=certificates))]
        if self.get("proxy"):
            handlers.append(urllib.request.ProxyHandler({"http": self.get("proxy"), "https": self.get("proxy")}))
        self.opener = urllib.request.build_opener(*handlers)

    def get(self, key, default=""):
        values = [self.files.get(section, key, fallback="") for section in ("download", "install", "global")]
        values = [os.environ.get("PIP_" + key.upper().replace("-", "_"), "")] + values
        return next((value for value in values if value.strip()), default)

    def open(self, url, headers):
        """Opens `url`; a login written in it, or one of netrc for its host, goes into the request."""
        parts = urllib.parse.urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        if parts.username:
            secret = urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or "")
            self.logins[host] = secret
        elif host not in self.logins:
            try:
                entry = netrc.netrc().authenticators(parts.hostname or "")
            except (OSError, netrc.NetrcParseError):
                entry = None
            self.logins[host] = (entry[0], entry[2]) if entry else None
        headers = {**headers, "User-Agent": "ferrotune-setup"}
        if self.logins[host]:
            token = base64.b64encode(":".join(self.logins[host]).encode()).decode()
            headers["Authorization"] = f"Basic {token}"
        request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
        return self.opener.open(request, timeout=60)

    def find(self, wheel):
        """The address of `wheel`: a path in a find-links folder, or a URL of the first index that has it."""
        for folder in self.folders:
            if (folder / wheel).is_file():
                return (folder / wheel).resolve().as_uri()
        project = wheel.split("-")[0].replace("_", "-")
        for index in self.indexes:
            try:
                with self.open(f"{index.rstrip('/')}/{project}/", {"Accept": "text/html"}) as page:
                    base, text = page.geturl(), page.read().decode("utf-8", "replace")
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    continue
                raise
            for link in re.findall(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)""", text, re.I):
                url = urllib.parse.urldefrag(urllib.parse.urljoin(base, html.unescape(link)))[0]
                if urllib.parse.unquote(url.rpartition("/")[2]) == wheel:
                    return url
        where = ", ".join(urllib.parse.urlsplit(index).netloc.rpartition("@")[2] for index in self.indexes)
        raise LookupError(f"{wheel} is not on the package index ({where or 'no-index is set'}): "
                          "set PIP_INDEX_URL to one that has it")
