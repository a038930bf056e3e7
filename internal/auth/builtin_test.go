package auth

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

func openBuiltIn(t *testing.T, file string) *BuiltIn {
	t.Helper()
	b, err := OpenBuiltIn(file, "https://lock.example")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func trustingBuiltIn(t *testing.T, b *BuiltIn, external ...IssuerConfig) *Issuers {
	t.Helper()
	i := NewIssuers(b, external, &http.Client{}, quiet())
	t.Cleanup(i.Close)
	return i
}

func TestBuiltInKeyIsMadeOnceAndKept(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "issuer.pem")
	first := openBuiltIn(t, file)
	raw, _, err := first.User(user, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	again := openBuiltIn(t, file)
	if !bytes.Equal(first.JWKS(), again.JWKS()) {
		t.Error("another key after a restart")
	}
	mustVerify(t, trustingBuiltIn(t, again), raw)
}

func TestBuiltInKeyThatCannotBeUsed(t *testing.T) {
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(other)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"empty":         nil,
		"garbage":       []byte("garbage"),
		"PEM of other":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("other")}),
		"another curve": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "issuer.pem")
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenBuiltIn(file, "https://lock.example"); err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "backup") {
				t.Errorf("got %v", err)
			}
			if after, _ := os.ReadFile(file); !bytes.Equal(after, content) {
				t.Error("the file was changed")
			}
		})
	}
}

func TestBuiltInKeyThatCannotBeReadOrWritten(t *testing.T) {
	dir := t.TempDir()
	for _, file := range []string{dir, filepath.Join(dir, "missing", "issuer.pem")} {
		if _, err := OpenBuiltIn(file, "https://lock.example"); err == nil || !strings.Contains(err.Error(), file[:len(dir)]) {
			t.Errorf("%s: %v", file, err)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestKeyThatCannotBePlacedLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	taken := filepath.Join(dir, "taken")
	if err := os.MkdirAll(filepath.Join(taken, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeKey(taken, []byte("secret")); err == nil {
		t.Error("no error")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestBuiltInURL(t *testing.T) {
	file := filepath.Join(t.TempDir(), "issuer.pem")
	for _, bad := range []string{"", "lock.example", "ftp://lock.example", "https://", "https://%zz"} {
		if _, err := OpenBuiltIn(file, bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	b, err := OpenBuiltIn(file, "http://192.168.1.2:8080/")
	if err != nil || b.URL() != "http://192.168.1.2:8080" {
		t.Errorf("got %v, %v", b, err)
	}
}

func TestBuiltInUser(t *testing.T) {
	b := openBuiltIn(t, filepath.Join(t.TempDir(), "issuer.pem"))
	now := time.Now()
	raw, claims, err := b.User(user, time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	want := Claims{Issuer: "https://lock.example", Subject: user, ID: claims.ID, Expires: now.Add(time.Hour).UTC().Truncate(time.Second)}
	if !reflect.DeepEqual(claims, want) || claims.ID == "" {
		t.Errorf("got %+v, want %+v", claims, want)
	}
	if verified := mustVerify(t, trustingBuiltIn(t, b), raw); !reflect.DeepEqual(verified, claims) {
		t.Errorf("issued %+v, verified %+v", claims, verified)
	}
	_, second, err := b.User(user, time.Hour, now)
	if err != nil || second.ID == claims.ID {
		t.Errorf("jti %q twice, %v", second.ID, err)
	}
	for _, bad := range []string{"", "alice", strings.ToUpper(user)} {
		if _, _, err := b.User(bad, time.Hour, now); err == nil {
			t.Errorf("user %q has a token", bad)
		}
	}
}

func TestBuiltInService(t *testing.T) {
	b := openBuiltIn(t, filepath.Join(t.TempDir(), "issuer.pem"))
	i := trustingBuiltIn(t, b)
	raw, claims, err := b.Service("door-service", "acme", []string{"lock:open", "lock:read"}, time.Minute, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if verified := mustVerify(t, i, raw); !reflect.DeepEqual(verified, claims) || claims.Org != "acme" || len(claims.Scopes) != 2 {
		t.Errorf("issued %+v, verified %+v", claims, verified)
	}
	token, _, err := jwt.NewParser().ParseUnverified(raw, jwt.MapClaims{})
	if err != nil {
		t.Fatal(err)
	}
	said := token.Claims.(jwt.MapClaims)
	if token.Header["typ"] != "at+jwt" || said["client_id"] != "door-service" || said["scope"] != "lock:open lock:read" || said["org_id"] != "acme" || said["iat"] == nil {
		t.Errorf("header %v, claims %v", token.Header, said)
	}
	without, _, err := b.Service("door-service", "acme", nil, time.Minute, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if c := mustVerify(t, i, without); len(c.Scopes) != 0 {
		t.Errorf("scopes %q", c.Scopes)
	}
}

// A client whose id is a UUID must not come by a user's token, nor a scope by a space.
func TestBuiltInServiceRefuses(t *testing.T) {
	b := openBuiltIn(t, filepath.Join(t.TempDir(), "issuer.pem"))
	for name, c := range map[string]struct {
		client, org string
		scopes      []string
	}{
		"no organisation": {user, "", nil},
		"no client":       {"", "acme", nil},
		"empty scope":     {"c", "acme", []string{""}},
		"scope in scope":  {"c", "acme", []string{"lock:read lock:open"}},
	} {
		if _, _, err := b.Service(c.client, c.org, c.scopes, time.Minute, time.Now()); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
}

func TestBuiltInUnknownKeyIsRefused(t *testing.T) {
	b := openBuiltIn(t, filepath.Join(t.TempDir(), "issuer.pem"))
	i := trustingBuiltIn(t, b)
	s := ecSigner(t, b.kid)
	mustRefuse(t, i, s.token(t, b.URL(), nil, nil), "signature")
	mustRefuse(t, i, s.token(t, b.URL(), nil, fields{"kid": "other"}), "kid")
	ours := signer{b.kid, jwt.SigningMethodES256, b.key}
	mustVerify(t, i, ours.token(t, b.URL(), nil, nil))
	mustRefuse(t, i, ours.token(t, b.URL(), fields{"aud": "shop"}, nil), "audience")
	mustRefuse(t, i, ours.token(t, b.URL(), fields{"org_id": ""}, nil), "organisation")
}

func TestExternalIssuerCannotTakeTheBuiltInsPlace(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	b := openBuiltIn(t, filepath.Join(t.TempDir(), "issuer.pem"))
	i := trustingBuiltIn(t, b, IssuerConfig{URL: b.URL(), JWKS: p.url + "/jwks", Audience: Audience})
	mustRefuse(t, i, s.token(t, b.URL(), nil, nil), "kid")
	raw, _, err := b.User(user, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	mustVerify(t, i, raw)
}

func TestBuiltInPublishesNothingSecret(t *testing.T) {
	b := openBuiltIn(t, filepath.Join(t.TempDir(), "issuer.pem"))
	var set struct{ Keys []map[string]any }
	if err := json.Unmarshal(b.JWKS(), &set); err != nil || len(set.Keys) != 1 {
		t.Fatalf("%s: %v", b.JWKS(), err)
	}
	key := set.Keys[0]
	if key["d"] != nil || key["kty"] != "EC" || key["alg"] != "ES256" || key["use"] != "sig" || key["kid"] != b.kid {
		t.Errorf("got %v", key)
	}
}

// Another service that knows nothing but the URL can verify the tokens.
func TestBuiltInCanBeDiscovered(t *testing.T) {
	mux := http.NewServeMux()
	server := httptest.NewServer(mux)
	defer server.Close()
	b, err := OpenBuiltIn(filepath.Join(t.TempDir(), "issuer.pem"), server.URL)
	if err != nil {
		t.Fatal(err)
	}
	mux.Handle("/.well-known/openid-configuration", answer(b.Discovery()))
	mux.Handle("/.well-known/jwks.json", answer(b.JWKS()))
	i := trusting(t, IssuerConfig{URL: server.URL, Audience: Audience, Orgs: []string{"acme"}})
	raw, claims, err := b.Service("c", "acme", []string{"lock:open"}, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if verified := mustVerify(t, i, raw); !reflect.DeepEqual(verified, claims) {
		t.Errorf("issued %+v, verified %+v", claims, verified)
	}
	var metadata map[string]any
	if err := json.Unmarshal(b.Discovery(), &metadata); err != nil {
		t.Fatal(err)
	}
	if metadata["token_endpoint"] != server.URL+"/oauth/token" || !reflect.DeepEqual(metadata["grant_types_supported"], []any{"client_credentials"}) {
		t.Errorf("got %v", metadata)
	}
}

// RFC 7638, 3: the required members in lexicographic order, which is also how Go writes a map.
func TestKeyIsNamedByItsThumbprint(t *testing.T) {
	b := openBuiltIn(t, filepath.Join(t.TempDir(), "issuer.pem"))
	var set struct{ Keys []map[string]string }
	if err := json.Unmarshal(b.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	k := set.Keys[0]
	canonical, err := json.Marshal(map[string]string{"kty": k["kty"], "crv": k["crv"], "x": k["x"], "y": k["y"]})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(canonical)
	if want := base64.RawURLEncoding.EncodeToString(sum[:]); k["kid"] != want {
		t.Errorf("kid %q, want %q", k["kid"], want)
	}
}
