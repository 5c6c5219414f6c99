#!/bin/sh
# Makes the certificates of the cluster's tests, valid from 2020 to 2120: an authority, and what it
# signed for a role on this machine. (cert.pem signs itself: to the authority it is a stranger's.)
#
#   sh tests/references/tls/make.sh
set -eu

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat >ca.cnf <<'END'
[ca]
default_ca = authority
[authority]
database = index.txt
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
[any]
commonName = supplied
[root]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
[node]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth,clientAuth
subjectAltName = DNS:localhost,IP:127.0.0.1
END
: >index.txt
echo 01 >serial

key() { openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$1"; }
sign() { openssl ca -config ca.cnf -batch -notext -startdate 20200101000000Z -enddate 21200101000000Z "$@"; }

key authority-key.pem
openssl req -new -key authority-key.pem -subj '/CN=Pomona test authority' -out authority.csr
sign -selfsign -keyfile authority-key.pem -extensions root -in authority.csr -out authority.pem

key node-key.pem
openssl req -new -key node-key.pem -subj '/CN=pomona' -out node.csr
sign -cert authority.pem -keyfile authority-key.pem -extensions node -in node.csr -out node.pem

# The authority's key is not kept: nothing else is to be signed.
chmod 644 node-key.pem
cp authority.pem node.pem node-key.pem "$here"
