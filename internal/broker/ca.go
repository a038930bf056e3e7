package broker

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// How long certificates last, and how long before its end the server's own is
// renewed at start.
const (
	caLife      = 20 * 365 * 24 * time.Hour
	deviceLife  = 10 * 365 * 24 * time.Hour
	serverLife  = 365 * 24 * time.Hour
	serverRenew = 60 * 24 * time.Hour
)

// CA is the authority that devices' certificates come from. Whoever has its key
// can pose as any device; it stays in the data folder, mode 0600.
type CA struct {
	folder string
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
}

// OpenCA opens the authority in a folder, making it at first use.
func OpenCA(folder string) (*CA, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	ca := &CA{folder: folder}
	pair, err := tls.LoadX509KeyPair(ca.path("ca.crt"), ca.path("ca.key"))
	if errors.Is(err, fs.ErrNotExist) {
		return ca, ca.create()
	}
	if err != nil {
		return nil, fmt.Errorf("read the certificate authority in %s: %w", folder, err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("read the certificate authority in %s: its key is not ECDSA", folder)
	}
	ca.cert, ca.key = pair.Leaf, key
	return ca, nil
}

func (ca *CA) path(name string) string { return filepath.Join(ca.folder, name) }

func (ca *CA) create() error {
	for _, name := range []string{"ca.crt", "ca.key"} {
		if _, err := os.Stat(ca.path(name)); err == nil {
			return fmt.Errorf("%s holds only one of ca.crt and ca.key: put the other one back, or remove both for a new authority (every device must then be enrolled again)", ca.folder)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca.key = key
	ca.cert, err = ca.sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "openlock device authority"},
		NotAfter:              time.Now().Add(caLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, &key.PublicKey)
	if err != nil {
		return err
	}
	return ca.write("ca", ca.cert, key)
}

// sign fills in what all certificates share.
func (ca *CA) sign(t *x509.Certificate, public *ecdsa.PublicKey) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	t.SerialNumber, t.NotBefore = serial, time.Now().Add(-time.Hour) // for devices whose clock is behind
	parent := ca.cert
	if t.IsCA {
		parent = t
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, public, ca.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// write puts a certificate and its key into the folder, the key first, so that
// there is never a certificate without one.
func (ca *CA) write(name string, cert *x509.Certificate, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	err = writeFile(ca.path(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
	if err != nil {
		return err
	}
	return writeFile(ca.path(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o644)
}

// writeFile replaces a file as a whole.
func writeFile(path string, content []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// Server is the broker's own certificate for localhost and further host names
// or addresses. It is made anew when it ends soon or lacks a name.
func (ca *CA) Server(names ...string) (tls.Certificate, error) {
	names = append([]string{"localhost", "127.0.0.1", "::1"}, names...)
	pair, err := tls.LoadX509KeyPair(ca.path("server.crt"), ca.path("server.key"))
	if err == nil && ca.serves(pair.Leaf, names) {
		return pair, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair, err
	}
	t := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "openlock"},
		NotAfter:    time.Now().Add(serverLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	cert, err := ca.sign(t, &key.PublicKey)
	if err != nil {
		return pair, err
	}
	if err := ca.write("server", cert, key); err != nil {
		return pair, err
	}
	return tls.LoadX509KeyPair(ca.path("server.crt"), ca.path("server.key"))
}

func (ca *CA) serves(cert *x509.Certificate, names []string) bool {
	return time.Until(cert.NotAfter) > serverRenew &&
		cert.CheckSignatureFrom(ca.cert) == nil &&
		!slices.ContainsFunc(names, func(n string) bool { return cert.VerifyHostname(n) != nil })
}

// Enroll makes a key and a certificate for a thing and writes device.key,
// device.crt and ca.crt into a folder, which must hold none of them yet. It
// answers with the certificate's serial number.
func (ca *CA) Enroll(thing, folder string) (serial string, err error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return "", err
	}
	for _, name := range []string{"device.key", "device.crt", "ca.crt"} {
		if _, err := os.Stat(filepath.Join(folder, name)); err == nil {
			return "", fmt.Errorf("%s already holds %s: choose another folder, or move the old identity away", folder, name)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	cert, err := ca.sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: thing},
		NotAfter:    time.Now().Add(deviceLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, &key.PublicKey)
	if err != nil {
		return "", err
	}
	device := &CA{folder: folder}
	if err := device.write("device", cert, key); err != nil {
		return "", err
	}
	return Serial(cert), writeFile(device.path("ca.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}), 0o644)
}

// Pool is what devices' certificates are verified against.
func (ca *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(ca.cert)
	return p
}

// CertFile is the authority's certificate, which devices and HTTPS clients of
// the server's own certificate need.
func (ca *CA) CertFile() string { return ca.path("ca.crt") }
