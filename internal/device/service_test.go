package device_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"
)

// A service is a real MQTT broker with mutual TLS, and just enough of the
// shadow service for one thing, T: a desired.open, what was reported, deltas.
type service struct {
	t      *testing.T
	broker *mqtt.Server
	addr   string
	certs  certs

	mu       sync.Mutex
	deaf     bool // updates are not answered
	desired  json.RawMessage
	reported json.RawMessage
	version  int
	updates  chan update                // as they come, answered or not
	connects chan packets.ConnectParams // CONNECT packets
}

type update struct {
	State struct {
		Reported struct {
			Open       json.RawMessage
			OpenResult *struct {
				ID, Result string
				At         int64
				Reason     *string
			}
			Battery    int
			Door, Lock string
		}
	}
	ClientToken string
}

const prefix = "$aws/things/T/shadow/"

func startService(t *testing.T) *service {
	s := &service{t: t, certs: makeCerts(t), updates: make(chan update, 100), connects: make(chan packets.ConnectParams, 100)}
	s.broker = mqtt.New(&mqtt.Options{InlineClient: true, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	listener, err := tls.Listen("tcp", "127.0.0.1:0", s.certs.server)
	check(t, err)
	s.addr = listener.Addr().String()
	check(t, s.broker.AddHook(&allowAll{seen: s.connects}, nil))
	check(t, s.broker.AddListener(listeners.NewNet("tls", listener)))
	check(t, s.broker.Subscribe(prefix+"get", 1, s.onGet))
	check(t, s.broker.Subscribe(prefix+"update", 2, s.onUpdate))
	check(t, s.broker.Serve())
	t.Cleanup(func() { s.broker.Close() })
	return s
}

// allowAll trusts whoever has a certificate, and notes each CONNECT.
type allowAll struct {
	mqtt.HookBase
	seen chan packets.ConnectParams
}

func (h *allowAll) ID() string                                              { return "allow-all" }
func (h *allowAll) OnConnectAuthenticate(*mqtt.Client, packets.Packet) bool { return true }
func (h *allowAll) OnACLCheck(*mqtt.Client, string, bool) bool              { return true }

func (h *allowAll) Provides(b byte) bool {
	return b == mqtt.OnConnect || b == mqtt.OnConnectAuthenticate || b == mqtt.OnACLCheck
}

func (h *allowAll) OnConnect(cl *mqtt.Client, p packets.Packet) error {
	if cl.Properties.Props.SessionExpiryInterval != 0 {
		p.Connect.Clean = false // not the clean session that is asked for
	}
	h.seen <- p.Connect
	return nil
}

// command writes desired.open, as the control of a server does.
func (s *service) command(id string, issued, expires time.Time) {
	open, err := json.Marshal([]any{id, issued.UnixMilli(), expires.UnixMilli()})
	check(s.t, err)
	s.mu.Lock()
	s.desired = open
	s.version++
	version := s.version
	s.mu.Unlock()
	s.publish("update/delta", map[string]any{
		"version": version, "timestamp": time.Now().Unix(), "state": map[string]any{"open": json.RawMessage(open)},
	})
}

func (s *service) onGet(_ *mqtt.Client, _ packets.Subscription, p packets.Packet) {
	var ask struct{ ClientToken string }
	check(s.t, json.Unmarshal(p.Payload, &ask))
	s.mu.Lock()
	state := map[string]any{}
	if s.desired != nil && !bytes.Equal(s.desired, s.reported) {
		state["delta"] = map[string]any{"open": s.desired}
	}
	version := s.version
	s.mu.Unlock()
	s.publish("get/accepted", map[string]any{
		"state": state, "version": version, "timestamp": time.Now().Unix(), "clientToken": ask.ClientToken,
	})
}

func (s *service) onUpdate(_ *mqtt.Client, _ packets.Subscription, p packets.Packet) {
	var u update
	check(s.t, json.Unmarshal(p.Payload, &u))
	s.updates <- u
	s.mu.Lock()
	deaf := s.deaf
	if !deaf && u.State.Reported.Open != nil {
		s.reported = u.State.Reported.Open
	}
	s.version++
	version := s.version
	s.mu.Unlock()
	if !deaf {
		s.publish("update/accepted", map[string]any{
			"version": version, "timestamp": time.Now().Unix(), "clientToken": u.ClientToken,
		})
	}
}

func (s *service) setDeaf(deaf bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deaf = deaf
}

func (s *service) publish(topic string, body any) {
	payload, err := json.Marshal(body)
	check(s.t, err)
	check(s.t, s.broker.Publish(prefix+topic, payload, false, 1))
}

// A certs holds an authority's certificate, and the identities that it signed
// for the broker and for the device.
type certs struct {
	server                    *tls.Config
	caFile, certFile, keyFile string
}

func makeCerts(t *testing.T) certs {
	dir := t.TempDir()
	caKey, caCert := sign(t, nil, nil, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	parent, err := x509.ParseCertificate(caCert)
	check(t, err)
	serverKey, serverCert := sign(t, parent, caKey, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	deviceKey, deviceCert := sign(t, parent, caKey, &x509.Certificate{Subject: pkix.Name{CommonName: "T"}})
	pool := x509.NewCertPool()
	pool.AddCert(parent)
	key, err := x509.MarshalPKCS8PrivateKey(deviceKey)
	check(t, err)
	return certs{
		server: &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{serverCert}, PrivateKey: serverKey}},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    pool,
		},
		caFile:   writePEM(t, filepath.Join(dir, "ca.pem"), "CERTIFICATE", caCert),
		certFile: writePEM(t, filepath.Join(dir, "cert.pem"), "CERTIFICATE", deviceCert),
		keyFile:  writePEM(t, filepath.Join(dir, "key.pem"), "PRIVATE KEY", key),
	}
}

// sign makes a key and its certificate; without a parent it signs itself.
func sign(t *testing.T, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, cert *x509.Certificate) (*ecdsa.PrivateKey, []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	if parent == nil {
		parent, parentKey = cert, key
	}
	cert.SerialNumber = big.NewInt(time.Now().UnixNano())
	cert.NotBefore, cert.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, &key.PublicKey, parentKey)
	check(t, err)
	return key, der
}

func writePEM(t *testing.T, path, kind string, der []byte) string {
	check(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return path
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
