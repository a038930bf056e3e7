package auth

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/golang-jwt/jwt/v5"
)

const user = "3f0c8a52-8d0c-4a6e-9a43-1d7c5b0d9e11"

// signer is a private key as an identity provider holds it.
type signer struct {
	kid    string
	method jwt.SigningMethod
	key    crypto.Signer
}

var rsaKeys sync.Map // by bits: RSA keys take long to make

func rsaSigner(t *testing.T, kid string, bits int) signer {
	t.Helper()
	if key, ok := rsaKeys.Load(bits); ok {
		return signer{kid, jwt.SigningMethodRS256, key.(crypto.Signer)}
	}
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	rsaKeys.Store(bits, key)
	return signer{kid, jwt.SigningMethodRS256, key}
}

func ecSigner(t *testing.T, kid string) signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer{kid, jwt.SigningMethodES256, key}
}

func edSigner(t *testing.T, kid string) signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer{kid, jwt.SigningMethodEdDSA, key}
}

// fields override claims or header entries; a nil value removes one.
type fields map[string]any

func (f fields) onto(m map[string]any) {
	for name, value := range f {
		if m[name] = value; value == nil {
			delete(m, name)
		}
	}
}

// token is good for the issuer at url, unless the overrides make it otherwise.
func (s signer) token(t *testing.T, url string, claims, header fields) string {
	t.Helper()
	all := jwt.MapClaims{"iss": url, "aud": "openlock", "sub": user, "exp": time.Now().Add(time.Hour).Unix()}
	claims.onto(all)
	token := jwt.NewWithClaims(s.method, all)
	token.Header["kid"] = s.kid
	header.onto(token.Header)
	raw, err := token.SignedString(s.key)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func jwkOf(t *testing.T, s signer) jwkset.JWKMarshal {
	t.Helper()
	jwk, err := jwkset.NewJWKFromKey(s.key.Public(), jwkset.JWKOptions{Metadata: jwkset.JWKMetadataOptions{
		KID: s.kid, ALG: jwkset.ALG(s.method.Alg()), USE: jwkset.UseSig,
	}})
	if err != nil {
		t.Fatal(err)
	}
	return jwk.Marshal()
}

func jwksOf(t *testing.T, signers ...signer) []byte {
	t.Helper()
	doc := jwkset.JWKSMarshal{Keys: []jwkset.JWKMarshal{}}
	for _, s := range signers {
		doc.Keys = append(doc.Keys, jwkOf(t, s))
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// provider is an identity provider whose answers can be changed while it runs.
type provider struct {
	url       string
	fetches   atomic.Int32 // of the JWK Set
	jwks      atomic.Pointer[http.HandlerFunc]
	discovery atomic.Pointer[http.HandlerFunc]
}

func answer(body []byte) *http.HandlerFunc {
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) })
	return &h
}

func discoveryOf(issuer, jwks string) *http.HandlerFunc {
	return answer(fmt.Appendf(nil, `{"issuer":%q,"jwks_uri":%q}`, issuer, jwks))
}

func (p *provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		(*p.discovery.Load())(w, r)
	case "/jwks":
		p.fetches.Add(1)
		(*p.jwks.Load())(w, r)
	default:
		http.NotFound(w, r)
	}
}

func (p *provider) at(t *testing.T, url string, signers ...signer) {
	p.url = url
	p.discovery.Store(discoveryOf(url, url+"/jwks"))
	p.jwks.Store(answer(jwksOf(t, signers...)))
}

func (p *provider) config(orgs ...string) IssuerConfig {
	return IssuerConfig{URL: p.url, Audience: "openlock", Orgs: orgs}
}

// serve starts a provider on a real socket.
func serve(t *testing.T, signers ...signer) *provider {
	t.Helper()
	p := &provider{}
	server := httptest.NewServer(p)
	t.Cleanup(server.Close)
	p.at(t, server.URL, signers...)
	return p
}

// RoundTrip lets a provider be reached without sockets, for tests in which time is faked.
func (p *provider) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	p.ServeHTTP(w, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return w.Result(), nil
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func trusting(t *testing.T, configs ...IssuerConfig) *Issuers {
	t.Helper()
	i := NewIssuers(nil, configs, &http.Client{}, quiet())
	t.Cleanup(i.Close)
	return i
}

// allowFetch ends the pause after the last fetch, as 30 s would.
func allowFetch(i *Issuers, url string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.trusted[url].started = time.Time{}
}

func mustVerify(t *testing.T, i *Issuers, raw string) Claims {
	t.Helper()
	c, err := i.Verify(t.Context(), raw)
	if err != nil {
		t.Fatalf("a good token is refused: %v", err)
	}
	return c
}

func mustRefuse(t *testing.T, i *Issuers, raw, why string) {
	t.Helper()
	c, err := i.Verify(t.Context(), raw)
	if !errors.Is(err, ErrToken) || !strings.Contains(err.Error(), why) {
		t.Fatalf("got %v, want ErrToken because of %q", err, why)
	}
	if !reflect.DeepEqual(c, Claims{}) {
		t.Fatalf("a refused token has claims: %+v", c)
	}
	for part := range strings.SplitSeq(raw, ".") {
		if len(part) > 8 && strings.Contains(err.Error(), part) {
			t.Fatalf("the error holds a part of the token: %v", err)
		}
	}
}

func TestEachAlgorithmIsAccepted(t *testing.T) {
	for _, s := range []signer{rsaSigner(t, "r", 2048), ecSigner(t, "e"), edSigner(t, "d")} {
		t.Run(s.method.Alg(), func(t *testing.T) {
			p := serve(t, s)
			expires := time.Now().Add(time.Minute).Truncate(time.Second).UTC()
			c := mustVerify(t, trusting(t, p.config()), s.token(t, p.url, fields{"jti": "j1", "exp": expires.Unix(), "scope": "lock:open"}, nil))
			want := Claims{Issuer: p.url, Subject: user, ID: "j1", Expires: expires}
			if !reflect.DeepEqual(c, want) {
				t.Errorf("got %+v, want %+v (a user has no scopes)", c, want)
			}
		})
	}
}

func TestServiceOfATrustedOrganisation(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config("acme", "beta"))
	c := mustVerify(t, i, s.token(t, p.url, fields{"sub": "door-service", "org_id": "beta", "scope": "lock:open lock:read"}, nil))
	if c.Org != "beta" || c.Subject != "door-service" || !reflect.DeepEqual(c.Scopes, []string{"lock:open", "lock:read"}) {
		t.Errorf("got %+v", c)
	}
}

func TestAudienceMayBeOneOfSeveral(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	mustVerify(t, trusting(t, p.config()), s.token(t, p.url, fields{"aud": []string{"other", "openlock"}}, nil))
}

func TestLeeway(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config())
	at := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	mustVerify(t, i, s.token(t, p.url, fields{"exp": at(-2 * time.Second)}, nil))
	mustVerify(t, i, s.token(t, p.url, fields{"nbf": at(3 * time.Second)}, nil))
	mustVerify(t, i, s.token(t, p.url, fields{"iat": at(time.Minute)}, nil)) // iat bars nothing
	mustRefuse(t, i, s.token(t, p.url, fields{"exp": at(-6 * time.Second)}, nil), "expired")
	mustRefuse(t, i, s.token(t, p.url, fields{"nbf": at(8 * time.Second)}, nil), "not valid yet")
}

func TestClaimsAreRefused(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config("acme"))
	for name, c := range map[string]struct {
		claims fields
		why    string
	}{
		"wrong aud":              {fields{"aud": "shop"}, "audience"},
		"no aud":                 {fields{"aud": nil}, "lacks"},
		"empty aud":              {fields{"aud": ""}, "lacks"},
		"aud is a number":        {fields{"aud": 7}, "lacks"},
		"no exp":                 {fields{"exp": nil}, "lacks"},
		"exp zero":               {fields{"exp": 0}, "lacks"},
		"exp is text":            {fields{"exp": "tomorrow"}, "well-formed"},
		"nbf is text":            {fields{"nbf": "tomorrow"}, "well-formed"},
		"no iss":                 {fields{"iss": nil}, "issuer"},
		"iss is a list":          {fields{"iss": []string{p.url}}, "issuer"},
		"iss with a slash":       {fields{"iss": p.url + "/"}, "issuer"},
		"no sub":                 {fields{"sub": nil}, "UUID"},
		"sub is no UUID":         {fields{"sub": "alice"}, "UUID"},
		"sub in upper case":      {fields{"sub": strings.ToUpper(user)}, "UUID"},
		"sub in braces":          {fields{"sub": "{" + user + "}"}, "UUID"},
		"sub as a URN":           {fields{"sub": "urn:uuid:" + user}, "UUID"},
		"sub without dashes":     {fields{"sub": strings.ReplaceAll(user, "-", "")}, "UUID"},
		"sub is a number":        {fields{"sub": 7}, "sub is not a string"},
		"SUB is not sub":         {fields{"sub": nil, "SUB": user}, "UUID"},
		"jti is a number":        {fields{"jti": 7}, "jti is not a string"},
		"service of another org": {fields{"org_id": "umbrella"}, "organisation"},
		"org is empty":           {fields{"org_id": ""}, "organisation"},
		"org is a list":          {fields{"org_id": []string{"acme"}}, "org_id is not a string"},
		"service without sub":    {fields{"org_id": "acme", "sub": nil}, "sub"},
		"scope is a list":        {fields{"org_id": "acme", "scope": []string{"lock:open"}}, "scope is not a string"},
		"ORG_ID is not org_id":   {fields{"ORG_ID": "acme", "sub": "service"}, "UUID"},
	} {
		t.Run(name, func(t *testing.T) { mustRefuse(t, i, s.token(t, p.url, c.claims, nil), c.why) })
	}
}

func TestIssuerOfUsersCannotSpeakForAnOrganisation(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	mustRefuse(t, trusting(t, p.config()), s.token(t, p.url, fields{"org_id": "acme"}, nil), "organisation")
}

func TestHeadersAreRefused(t *testing.T) {
	s, stranger := ecSigner(t, "k"), ecSigner(t, "k")
	p := serve(t, s, edSigner(t, "other"))
	i := trusting(t, p.config())
	mustRefuse(t, i, s.token(t, p.url, nil, fields{"crit": []string{"b64"}, "b64": true}), "crit")
	mustRefuse(t, i, s.token(t, p.url, nil, fields{"crit": []string{}}), "crit")
	mustRefuse(t, i, s.token(t, p.url, nil, fields{"kid": 7}), "well-formed")
	mustRefuse(t, i, s.token(t, p.url, nil, fields{"kid": "other"}), "kid")
	mustRefuse(t, i, stranger.token(t, p.url, nil, fields{"jwk": jwkOf(t, stranger)}), "signature")
	mustRefuse(t, i, stranger.token(t, p.url, nil, fields{"jku": "https://evil.example/jwks"}), "signature")
}

func TestMalformedIsRefused(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config())
	good := s.token(t, p.url, nil, nil)
	mustVerify(t, i, good)
	parts := strings.Split(good, ".")
	// The last character of 64 bytes in base64url has four spare bits, which must be zero: else one
	// token could be written in sixteen ways.
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := len(good) - 1
	twin := good[:last] + string(alphabet[strings.IndexByte(alphabet, good[last])+1])
	forged := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil,
		`{"iss":%q,"aud":"openlock","sub":"00000000-0000-4000-8000-000000000000","exp":9999999999}`, p.url))
	for name, c := range map[string]struct{ raw, why string }{
		"empty":            {"", "well-formed"},
		"no dots":          {"garbage", "well-formed"},
		"two parts":        {parts[0] + "." + parts[1], "well-formed"},
		"four parts":       {good + ".x", "well-formed"},
		"spare bits":       {twin, "well-formed"},
		"padding":          {good + "==", "well-formed"},
		"space":            {good + " ", "well-formed"},
		"header no JSON":   {"AAAA." + parts[1] + "." + parts[2], "well-formed"},
		"claims are null":  {parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte("null")) + "." + parts[2], "issuer"},
		"claims are other": {parts[0] + "." + forged + "." + parts[2], "signature"},
		"no signature":     {parts[0] + "." + parts[1] + ".", "signature"},
		"too long":         {good + strings.Repeat("A", maxTokenBytes), "8 KiB"},
	} {
		t.Run(name, func(t *testing.T) { mustRefuse(t, i, c.raw, c.why) })
	}
}

func TestAlgNoneIsRefused(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config())
	mustVerify(t, i, s.token(t, p.url, nil, nil))
	parts := strings.Split(s.token(t, p.url, nil, nil), ".")
	for _, alg := range []string{"none", "None", "NONE", ""} {
		header := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"alg":%q,"kid":"k"}`, alg))
		mustRefuse(t, i, header+"."+parts[1]+".", "alg is none of")
		mustRefuse(t, i, header+"."+parts[1]+"."+parts[2], "alg is none of")
	}
}

// The oldest trick: use the public key, which everybody has, as the secret of an HMAC.
func TestAlgorithmConfusionIsRefused(t *testing.T) {
	s := rsaSigner(t, "k", 2048)
	p := serve(t, s, signer{"k", jwt.SigningMethodES256, ecSigner(t, "").key})
	i := trusting(t, p.config())
	good := s.token(t, p.url, nil, nil)
	mustVerify(t, i, good)
	der, err := x509.MarshalPKIXPublicKey(s.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	secrets := map[string][]byte{
		"PEM":     pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}),
		"DER":     der,
		"modulus": s.key.Public().(*rsa.PublicKey).N.Bytes(),
		"JWKS":    jwksOf(t, s),
		"empty":   {},
	}
	for name, secret := range secrets {
		for _, method := range []jwt.SigningMethod{jwt.SigningMethodHS256, jwt.SigningMethodHS512} {
			t.Run(name+" "+method.Alg(), func(t *testing.T) {
				token := jwt.NewWithClaims(method, jwt.MapClaims{"iss": p.url, "aud": "openlock", "sub": user, "exp": time.Now().Add(time.Hour).Unix()})
				token.Header["kid"] = "k"
				raw, err := token.SignedString(secret)
				if err != nil {
					t.Fatal(err)
				}
				mustRefuse(t, i, raw, "alg is none of")
			})
		}
	}
	for _, method := range []jwt.SigningMethod{jwt.SigningMethodRS384, jwt.SigningMethodPS256} {
		mustRefuse(t, i, signer{"k", method, s.key}.token(t, p.url, nil, nil), "alg is none of")
	}
	mustRefuse(t, i, signer{"k", jwt.SigningMethodEdDSA, edSigner(t, "k").key}.token(t, p.url, nil, nil), "kid")
}

func TestSymmetricKeyInTheSetIsNoKey(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	secret := []byte("0123456789abcdef0123456789abcdef")
	set := bytes.Replace(jwksOf(t, s), []byte(`{"keys":[`), fmt.Appendf(nil,
		`{"keys":[{"kty":"oct","kid":"h","alg":"HS256","k":%q},`, base64.RawURLEncoding.EncodeToString(secret)), 1)
	p.jwks.Store(answer(set))
	i := trusting(t, p.config())
	mustVerify(t, i, s.token(t, p.url, nil, nil))
	token := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"iss": p.url, "aud": "openlock", "sub": user, "exp": time.Now().Add(time.Hour).Unix()})
	token.Header["kid"] = "h"
	raw, err := token.SignedString(secret)
	if err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, i, raw, "alg is none of")
}

func TestKeysThatMustNotVerifyAreRefused(t *testing.T) {
	good := ecSigner(t, "good")
	small := rsaSigner(t, "small", 1024)
	for name, c := range map[string]struct {
		s      signer
		change func(*jwkset.JWKMarshal)
	}{
		"RSA of 1024 bits":    {small, func(*jwkset.JWKMarshal) {}},
		"for encryption":      {ecSigner(t, "x"), func(k *jwkset.JWKMarshal) { k.USE = jwkset.UseEnc }},
		"not for verifying":   {ecSigner(t, "x"), func(k *jwkset.JWKMarshal) { k.KEYOPS = []jwkset.KEYOPS{jwkset.KeyOpsDeriveKey} }},
		"for another alg":     {rsaSigner(t, "x", 2048), func(k *jwkset.JWKMarshal) { k.ALG = jwkset.AlgRS512 }},
		"point off the curve": {ecSigner(t, "x"), func(k *jwkset.JWKMarshal) { k.Y = k.X }},
		"another curve":       {ecSigner(t, "x"), func(k *jwkset.JWKMarshal) { k.CRV = jwkset.CrvP384 }},
	} {
		t.Run(name, func(t *testing.T) {
			bad := jwkOf(t, c.s)
			c.change(&bad)
			set, err := json.Marshal(jwkset.JWKSMarshal{Keys: []jwkset.JWKMarshal{bad, jwkOf(t, good)}})
			if err != nil {
				t.Fatal(err)
			}
			p := serve(t)
			p.jwks.Store(answer(set))
			i := trusting(t, p.config())
			mustVerify(t, i, good.token(t, p.url, nil, nil))
			mustRefuse(t, i, c.s.token(t, p.url, nil, nil), "kid")
		})
	}
}

func TestOnlyP256IsForES256(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwk := jwkOf(t, signer{"k", jwt.SigningMethodES384, key})
	for _, alg := range []jwkset.ALG{"", jwkset.AlgES256, jwkset.AlgES384} {
		jwk.ALG = alg
		if k, ok := usableKey(jwk); ok {
			t.Errorf("a P-384 key with alg %q is taken for %s", alg, k.alg)
		}
	}
}

func TestKeysWithoutUseOrAlgAreTaken(t *testing.T) {
	s := rsaSigner(t, "k", 2048)
	jwk := jwkOf(t, s)
	jwk.ALG, jwk.USE = "", ""
	set, err := json.Marshal(jwkset.JWKSMarshal{Keys: []jwkset.JWKMarshal{jwk}})
	if err != nil {
		t.Fatal(err)
	}
	p := serve(t)
	p.jwks.Store(answer(set))
	mustVerify(t, trusting(t, p.config()), s.token(t, p.url, nil, nil))
}

func TestTokenWithoutKidNeedsASoleKey(t *testing.T) {
	one, two := ecSigner(t, "1"), ecSigner(t, "2")
	p := serve(t, one, edSigner(t, "d"))
	mustVerify(t, trusting(t, p.config()), one.token(t, p.url, nil, fields{"kid": nil}))
	p.jwks.Store(answer(jwksOf(t, one, two)))
	mustRefuse(t, trusting(t, p.config()), one.token(t, p.url, nil, fields{"kid": nil}), "kid")
}

func TestIssuersDoNotShareKeys(t *testing.T) {
	a, b := ecSigner(t, "same"), ecSigner(t, "same")
	pa, pb := serve(t, a), serve(t, b)
	i := trusting(t, pa.config(), pb.config())
	mustVerify(t, i, a.token(t, pa.url, nil, nil))
	mustVerify(t, i, b.token(t, pb.url, nil, nil))
	mustRefuse(t, i, b.token(t, pa.url, nil, nil), "signature")
	mustRefuse(t, i, a.token(t, pb.url, nil, nil), "signature")
	only := ecSigner(t, "only-b")
	pb.jwks.Store(answer(jwksOf(t, only)))
	allowFetch(i, pb.url)
	mustVerify(t, i, only.token(t, pb.url, nil, nil))
	mustRefuse(t, i, only.token(t, pa.url, nil, nil), "kid")
}

func TestEachIssuerHasItsOwnAudience(t *testing.T) {
	a, b := ecSigner(t, "k"), ecSigner(t, "k")
	pa, pb := serve(t, a), serve(t, b)
	i := trusting(t, IssuerConfig{URL: pa.url, Audience: "for-a"}, IssuerConfig{URL: pb.url, Audience: "for-b"})
	mustVerify(t, i, a.token(t, pa.url, fields{"aud": "for-a"}, nil))
	mustRefuse(t, i, a.token(t, pa.url, fields{"aud": "for-b"}, nil), "audience")
}

func TestFloodOfUnknownKeysFetchesOnce(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config())
	mustVerify(t, i, s.token(t, p.url, nil, nil))
	flood := func() {
		var callers sync.WaitGroup
		for n := range 200 {
			callers.Go(func() {
				raw := s.token(t, p.url, nil, fields{"kid": fmt.Sprint("unknown", n)})
				if _, err := i.Verify(t.Context(), raw); !errors.Is(err, ErrToken) {
					t.Errorf("got %v", err)
				}
			})
		}
		callers.Wait()
	}
	for round := range int32(3) {
		if flood(); p.fetches.Load() != 1+round {
			t.Fatalf("%d fetches of the keys in round %d", p.fetches.Load(), round)
		}
		allowFetch(i, p.url)
	}
}

func TestFloodFetchesAtMostEvery30s(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := ecSigner(t, "k")
		p := &provider{}
		p.at(t, "https://idp.example", s)
		i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
		defer i.Close()
		unknown := s.token(t, p.url, fields{"exp": time.Now().Add(time.Hour).Unix()}, fields{"kid": "unknown"})
		for range 3 * 60 {
			mustRefuse(t, i, unknown, "kid")
			time.Sleep(time.Second)
		}
		if n := p.fetches.Load(); n > 1+3*2 {
			t.Errorf("%d fetches in 3 minutes", n)
		}
	})
}

func TestNewKeyIsFetchedOnDemand(t *testing.T) {
	old, fresh := ecSigner(t, "old"), ecSigner(t, "new")
	p := serve(t, old)
	i := trusting(t, p.config())
	mustVerify(t, i, old.token(t, p.url, nil, nil))
	p.jwks.Store(answer(jwksOf(t, old, fresh)))
	mustRefuse(t, i, fresh.token(t, p.url, nil, nil), "30 s")
	allowFetch(i, p.url)
	mustVerify(t, i, fresh.token(t, p.url, nil, nil))
}

// hang answers nothing until the caller gives up, and tells when it was called.
func hang(called chan<- struct{}) *http.HandlerFunc {
	h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		called <- struct{}{}
		<-r.Context().Done()
	})
	return &h
}

func TestKnownKeysAreNotHeldUpByAFetch(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config())
	mustVerify(t, i, s.token(t, p.url, nil, nil))

	called := make(chan struct{}, 1)
	p.jwks.Store(hang(called))
	allowFetch(i, p.url)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error)
	go func() {
		_, err := i.Verify(ctx, s.token(t, p.url, nil, fields{"kid": "unknown"}))
		ended <- err
	}()
	<-called // the fetch hangs, and with it the caller
	mustVerify(t, i, s.token(t, p.url, fields{"jti": "not cached"}, nil))
	select {
	case err := <-ended:
		t.Errorf("the caller did not wait: %v", err)
	default:
	}
	cancel()
	if err := <-ended; !errors.Is(err, ErrToken) {
		t.Errorf("got %v", err)
	}
}

func TestCallerWhoLeavesDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := ecSigner(t, "k")
		p := &provider{}
		p.at(t, "https://idp.example", s)
		p.jwks.Store(hang(make(chan struct{}, 1)))
		i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
		defer i.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		_, err := i.Verify(ctx, s.token(t, p.url, nil, nil))
		if waited := time.Since(begin); !errors.Is(err, ErrToken) || waited != time.Second {
			t.Errorf("got %v after %v", err, waited)
		}
	})
}

func TestUnknownKeysDoNotPileUpBehindASlowIssuer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := ecSigner(t, "k")
		p := &provider{}
		p.at(t, "https://idp.example", s)
		p.jwks.Store(hang(make(chan struct{}, 1)))
		i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
		defer i.Close()
		raw, begin := s.token(t, p.url, nil, nil), time.Now()
		var refused atomic.Int32
		var callers sync.WaitGroup
		for range 500 {
			callers.Go(func() {
				if _, err := i.Verify(t.Context(), raw); errors.Is(err, ErrToken) {
					refused.Add(1)
				}
			})
		}
		synctest.Wait()
		if n := refused.Load(); n != 500-maxWaiters {
			t.Errorf("%d of 500 are refused at once, want all but %d", n, maxWaiters)
		}
		callers.Wait()
		if waited := time.Since(begin); waited != fetchTime {
			t.Errorf("the others waited %v for a fetch that may take %v", waited, fetchTime)
		}
		if refused.Load() != 500 {
			t.Errorf("an issuer that does not answer opened something: %d refused", refused.Load())
		}
	})
}

func TestIssuerDeadAtStartComesAlive(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	s := ecSigner(t, "k")
	p := &provider{}
	p.at(t, "http://"+address, s)
	i := trusting(t, p.config())
	raw := s.token(t, p.url, nil, nil)
	mustRefuse(t, i, raw, "kid")

	if listener, err = net.Listen("tcp", address); err != nil {
		t.Skip("somebody else took the port")
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: p}}
	server.Start()
	defer server.Close()
	allowFetch(i, p.url)
	mustVerify(t, i, raw)
}

func TestDeadIssuerIsTriedAgainUnasked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := ecSigner(t, "k")
		p := &provider{}
		p.at(t, "https://idp.example", s)
		alive := p.discovery.Load()
		down := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
		p.discovery.Store(&down)
		i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
		defer i.Close()
		time.Sleep(10 * time.Minute)
		p.discovery.Store(alive)
		time.Sleep(fetchGap)
		synctest.Wait()
		if p.fetches.Load() != 1 {
			t.Errorf("%d fetches of the keys", p.fetches.Load())
		}
		mustVerify(t, i, s.token(t, p.url, nil, nil))
	})
}

// garbage is what may come instead of a JWK Set.
func garbage(t *testing.T, s signer) map[string]*http.HandlerFunc {
	status := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write(jwksOf(t, s))
	})
	cut := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "5000")
		_, _ = w.Write(jwksOf(t, s))
	})
	padded := append(jwksOf(t, s), bytes.Repeat([]byte(" "), maxResponseBytes)...)
	return map[string]*http.HandlerFunc{
		"status 500":      &status,
		"cut short":       &cut,
		"HTML":            answer([]byte("<html>down for maintenance</html>")),
		"nothing":         answer(nil),
		"no keys member":  answer([]byte(`{"error":"try later"}`)),
		"keys are null":   answer([]byte(`{"keys":null}`)),
		"keys are text":   answer([]byte(`{"keys":"none"}`)),
		"keys are other":  answer([]byte(`{"keys":[1,2]}`)),
		"keys are hollow": answer([]byte(`{"keys":[{}]}`)),
		"trailing data":   answer(append(jwksOf(t, s), '{')),
		"oversized":       answer(padded),
	}
}

func TestGarbageOpensNothingAndBreaksNothing(t *testing.T) {
	known, stranger := ecSigner(t, "known"), ecSigner(t, "stranger")
	for name, h := range garbage(t, stranger) {
		for _, place := range []string{"jwks", "discovery"} {
			t.Run(name+" as "+place, func(t *testing.T) {
				p := serve(t, known)
				i := trusting(t, p.config())
				cached := known.token(t, p.url, nil, nil)
				mustVerify(t, i, cached)
				if place == "jwks" {
					p.jwks.Store(h)
				} else {
					p.discovery.Store(h)
				}
				allowFetch(i, p.url)
				mustRefuse(t, i, stranger.token(t, p.url, nil, nil), "kid")
				mustVerify(t, i, cached)
				mustVerify(t, i, known.token(t, p.url, fields{"jti": "not cached"}, nil))
			})
		}
	}
}

func TestJWKSAddressCanBeConfigured(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, IssuerConfig{URL: "https://unreachable.invalid", JWKS: p.url + "/jwks", Audience: "openlock"})
	mustVerify(t, i, s.token(t, "https://unreachable.invalid", nil, nil))
}

func TestDiscoveryMustNameTheIssuerExactly(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	for _, other := range []string{p.url + "/", "https://evil.example", ""} {
		p.discovery.Store(discoveryOf(other, p.url+"/jwks"))
		mustRefuse(t, trusting(t, p.config()), s.token(t, p.url, nil, nil), "kid")
	}
	p.discovery.Store(discoveryOf(p.url, "http://idp.example/jwks")) // http, and not this machine
	mustRefuse(t, trusting(t, p.config()), s.token(t, p.url, nil, nil), "kid")
	if n := p.fetches.Load(); n != 0 {
		t.Errorf("%d fetches of the keys", n)
	}
}

func TestIssuerWithAPath(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	front := httptest.NewServer(http.StripPrefix("/tenant", p))
	defer front.Close()
	tenant := front.URL + "/tenant/" // the slash counts in iss, but is dropped for discovery
	p.discovery.Store(discoveryOf(tenant, p.url+"/jwks"))
	i := trusting(t, IssuerConfig{URL: tenant, Audience: "openlock"})
	mustVerify(t, i, s.token(t, tenant, nil, nil))
}

func TestNeverFromHTTPSToHTTP(t *testing.T) {
	s := ecSigner(t, "k")
	plain := serve(t, s)
	tls := &provider{}
	server := httptest.NewTLSServer(tls)
	defer server.Close()
	tls.at(t, server.URL, s)
	try := func() error {
		i := NewIssuers(nil, []IssuerConfig{tls.config()}, server.Client(), quiet())
		defer i.Close()
		_, err := i.Verify(t.Context(), s.token(t, tls.url, nil, nil))
		return err
	}
	redirect := func(to string) *http.HandlerFunc {
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) })
		return &h
	}
	if err := try(); err != nil {
		t.Fatal(err)
	}
	tls.discovery.Store(redirect(plain.url + "/.well-known/openid-configuration"))
	if err := try(); !errors.Is(err, ErrToken) {
		t.Errorf("redirect of discovery to http: %v", err)
	}
	tls.discovery.Store(discoveryOf(tls.url, plain.url+"/jwks"))
	if err := try(); !errors.Is(err, ErrToken) {
		t.Errorf("jwks_uri with http: %v", err)
	}
	tls.discovery.Store(discoveryOf(tls.url, tls.url+"/jwks"))
	tls.jwks.Store(redirect(plain.url + "/jwks"))
	if err := try(); !errors.Is(err, ErrToken) {
		t.Errorf("redirect of the keys to http: %v", err)
	}
	if n := plain.fetches.Load(); n != 0 {
		t.Errorf("keys were fetched over http %d times", n)
	}
	tls.jwks.Store(redirect(tls.url + "/jwks")) // for ever
	if err := try(); !errors.Is(err, ErrToken) {
		t.Errorf("endless redirect: %v", err)
	}
	elsewhere := httptest.NewTLSServer(*answer(jwksOf(t, s)))
	defer elsewhere.Close()
	tls.jwks.Store(redirect(elsewhere.URL))
	if err := try(); err != nil {
		t.Errorf("redirect from https to https: %v", err)
	}
}

func TestWithdrawnKeyIsRefusedAfterTheRefresh(t *testing.T) {
	for name, after := range map[string][]signer{"another key": {ecSigner(t, "new")}, "no key": nil} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := ecSigner(t, "old")
				p := &provider{}
				p.at(t, "https://idp.example", s)
				i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
				defer i.Close()
				cached, other := s.token(t, p.url, nil, nil), s.token(t, p.url, fields{"jti": "2"}, nil)
				mustVerify(t, i, cached)
				p.jwks.Store(answer(jwksOf(t, after...)))
				time.Sleep(refreshEvery - time.Second)
				mustVerify(t, i, cached)
				time.Sleep(time.Second)
				synctest.Wait()
				mustRefuse(t, i, cached, "kid")
				mustRefuse(t, i, other, "kid")
			})
		})
	}
}

func TestRefreshWithTheSameKeysForgetsNoToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := ecSigner(t, "k")
		p := &provider{}
		p.at(t, "https://idp.example", s)
		i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
		defer i.Close()
		raw := s.token(t, p.url, nil, nil)
		mustVerify(t, i, raw)
		time.Sleep(refreshEvery)
		synctest.Wait()
		if known, _ := i.cache.get(sha256.Sum256([]byte(raw))); p.fetches.Load() != 2 || !known.holds(time.Now()) {
			t.Errorf("after %d fetches of the same keys the token must be verified afresh", p.fetches.Load())
		}
	})
}

func TestKnownKeyOutlivesItsIssuersOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := ecSigner(t, "k")
		p := &provider{}
		p.at(t, "https://idp.example", s)
		i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
		defer i.Close()
		mustVerify(t, i, s.token(t, p.url, nil, nil))
		p.jwks.Store(hang(make(chan struct{}, 1000)))
		time.Sleep(time.Hour)
		mustVerify(t, i, s.token(t, p.url, nil, nil))
	})
}

func TestVerifiedTokenIsRemembered(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config())
	raw := s.token(t, p.url, nil, nil)
	first := mustVerify(t, i, raw)
	if known, ok := i.cache.get(sha256.Sum256([]byte(raw))); !ok || !known.holds(time.Now()) {
		t.Error("the token is not in the cache")
	}
	if again := mustVerify(t, i, raw); !reflect.DeepEqual(first, again) {
		t.Errorf("first %+v, then %+v", first, again)
	}
	bad := s.token(t, p.url, fields{"aud": "shop"}, nil)
	mustRefuse(t, i, bad, "audience")
	if _, ok := i.cache.get(sha256.Sum256([]byte(bad))); ok {
		t.Error("a refused token is in the cache")
	}
}

func TestRememberedTokenStillExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := ecSigner(t, "k")
		p := &provider{}
		p.at(t, "https://idp.example", s)
		i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
		defer i.Close()
		raw := s.token(t, p.url, fields{"exp": time.Now().Add(time.Minute).Unix()}, nil)
		mustVerify(t, i, raw)
		time.Sleep(time.Minute + leeway - time.Nanosecond)
		mustVerify(t, i, raw)
		time.Sleep(time.Nanosecond)
		mustRefuse(t, i, raw, "expired")
	})
}

func TestRememberedTokenIsNotUsedBeforeItsTime(t *testing.T) {
	now := time.Now()
	s := newIssuer(IssuerConfig{}, &keySet{})
	v := verifiedToken{claims: Claims{Expires: now.Add(time.Hour)}, notBefore: now, issuer: s, keys: s.keys.Load()}
	if !v.holds(now) || v.holds(now.Add(-time.Nanosecond)) { // clocks may be set back
		t.Error("nbf is not judged at each use")
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := tokenCache{tokens: make(map[[sha256.Size]byte]verifiedToken)}
	for n := range maxCachedTokens + 500 {
		c.put(sha256.Sum256(fmt.Append(nil, n)), verifiedToken{})
	}
	if len(c.tokens) != maxCachedTokens {
		t.Errorf("%d tokens in the cache", len(c.tokens))
	}
}

func TestConcurrentVerify(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	i := trusting(t, p.config())
	var callers sync.WaitGroup
	for n := range 64 {
		callers.Go(func() {
			raw := s.token(t, p.url, fields{"jti": fmt.Sprint(n % 8)}, nil)
			for range 4 {
				if _, err := i.Verify(t.Context(), raw); err != nil {
					t.Error(err)
				}
			}
		})
	}
	callers.Wait()
	if n := p.fetches.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
}

func TestCloseKeepsWhatIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // which fails if a goroutine stays
		s := ecSigner(t, "k")
		p := &provider{}
		p.at(t, "https://idp.example", s)
		i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{Transport: p}, quiet())
		mustVerify(t, i, s.token(t, p.url, nil, nil))
		i.Close()
		i.Close()
		time.Sleep(time.Hour)
		mustVerify(t, i, s.token(t, p.url, nil, nil))
		if i.startFetch(i.trusted[p.url]) != nil || p.fetches.Load() != 1 {
			t.Error("keys are fetched after Close")
		}
	})
}

func TestCloseInterruptsAFetch(t *testing.T) {
	p := serve(t)
	called := make(chan struct{}, 1)
	p.jwks.Store(hang(called))
	i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{}, quiet())
	<-called
	i.Close()
}

func TestUnusableIssuersAreNotTrusted(t *testing.T) {
	s, other := ecSigner(t, "k"), ecSigner(t, "k")
	p, impostor := serve(t, s), serve(t, other)
	var log bytes.Buffer
	i := NewIssuers(nil, []IssuerConfig{
		{URL: "http://idp.example", Audience: "openlock"},
		{URL: "https://idp.example"},
		p.config(),
		{URL: p.url, JWKS: impostor.url + "/jwks", Audience: "openlock", Orgs: []string{"acme"}},
	}, &http.Client{}, slog.New(slog.NewTextHandler(&log, nil)))
	defer i.Close()
	mustVerify(t, i, s.token(t, p.url, nil, nil))
	mustRefuse(t, i, other.token(t, p.url, nil, nil), "signature")
	mustRefuse(t, i, s.token(t, p.url, fields{"org_id": "acme"}, nil), "organisation")
	mustRefuse(t, i, s.token(t, "https://idp.example", nil, nil), "issuer")
	mustRefuse(t, i, s.token(t, "https://idp.example", fields{"aud": ""}, nil), "issuer")
	if n := strings.Count(log.String(), "not trusted"); n != 3 {
		t.Errorf("%d issuers reported:\n%s", n, log.String())
	}
}

func TestNoTokenInTheLog(t *testing.T) {
	s := ecSigner(t, "k")
	p := serve(t, s)
	p.jwks.Store(answer([]byte("garbage")))
	var log bytes.Buffer
	i := NewIssuers(nil, []IssuerConfig{p.config()}, &http.Client{}, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	raw := s.token(t, p.url, nil, nil)
	mustRefuse(t, i, raw, "kid")
	i.Close()
	if log.Len() == 0 || strings.Contains(log.String(), strings.Split(raw, ".")[2]) {
		t.Errorf("log: %s", log.String())
	}
}

func TestParseIssuer(t *testing.T) {
	got, err := ParseIssuer("url=https://idp.example,audience=openlock,jwks=https://idp.example/keys?v=1,org=acme, org=beta")
	want := IssuerConfig{URL: "https://idp.example", JWKS: "https://idp.example/keys?v=1", Audience: "openlock", Orgs: []string{"acme", "beta"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, local := range []string{"http://localhost:8080", "http://127.0.0.1:1", "http://[::1]:1"} {
		if _, err := ParseIssuer("audience=a,url=" + local); err != nil {
			t.Error(err)
		}
	}
	for s, hint := range map[string]string{
		"":                                                          "url, audience, jwks and org",
		"https://idp.example":                                       "url, audience, jwks and org",
		"audience=a":                                                "add url=",
		"url=https://idp.example":                                   "add audience=",
		"url=,audience=a":                                           "write url=",
		"url=https://a.example,audience":                            "write audience=",
		"url=https://a.example,org=":                                "write org=",
		"url=https://a.example,url=https://b":                       "twice",
		"url=http://idp.example,audience=a":                         "https://",
		"url=http://127.0.0.1.example,audience=a":                   "https://",
		"url=http://localhost.example,audience=a":                   "https://",
		"url=idp.example,audience=a":                                "https://",
		"url=file:///etc/passwd,audience=a":                         "https://",
		"url=https://u:p@idp.example,audience=a":                    "remove the user name",
		"url=https://idp.example,audience=a,jwks=http://idp.ex/k":   "jwks",
		"url=https://idp.example,audience=a,timeout=5s":             "url, audience, jwks and org",
		"url=https://idp.example,audience=a,jwks=https://%zz.ex/k":  "jwks",
		"url=https://idp.example,,audience=a":                       "url, audience, jwks and org",
		"url=https://idp.example,audience=a,audience=b,org=acme":    "twice",
		"url=https://idp.example,audience=a,jwks=https://x,jwks=y,": "twice",
	} {
		if c, err := ParseIssuer(s); err == nil || !strings.Contains(err.Error(), hint) || !reflect.DeepEqual(c, IssuerConfig{}) {
			t.Errorf("%q: got %+v, %v; want an error with %q", s, c, err, hint)
		}
	}
}

func FuzzParseKeys(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA"},{"kty":"OKP","crv":"Ed25519","x":"AA"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		set, err := parseKeys(raw)
		if (set == nil) == (err == nil) {
			t.Errorf("set %v, error %v", set, err)
		}
	})
}

func BenchmarkVerifyRemembered(b *testing.B) {
	built, err := OpenBuiltIn(b.TempDir()+"/key.pem", "https://lock.example")
	if err != nil {
		b.Fatal(err)
	}
	i := NewIssuers(built, nil, &http.Client{}, quiet())
	defer i.Close()
	raw, _, err := built.User(user, time.Hour, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := i.Verify(b.Context(), raw); err != nil {
			b.Fatal(err)
		}
	}
}
