package auth

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/golang-jwt/jwt/v5"
)

// Audience is the aud of the tokens that the built-in issuer signs.
const Audience = "openlock"

// BuiltIn is openlock's own issuer, for those who have none. It signs with ES256 and is safe for
// concurrent use.
type BuiltIn struct {
	url       string
	key       *ecdsa.PrivateKey
	kid       string
	keys      *keySet
	jwks      []byte
	discovery []byte
}

// OpenBuiltIn loads the private key of the issuer from keyFile, or makes one at first use: P-256 as
// PKCS#8 in PEM, readable by its owner alone. A file that is there but cannot be used is an error
// and never overwritten. url is the iss of its tokens and the public address of this server; a
// slash at its end is dropped.
func OpenBuiltIn(keyFile, url string) (*BuiltIn, error) {
	b := &BuiltIn{url: strings.TrimRight(url, "/")}
	if err := checkPublicURL(b.url); err != nil {
		return nil, err
	}
	var err error
	b.key, err = loadKey(keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		b.key, err = createKey(keyFile)
	}
	if err != nil {
		return nil, fmt.Errorf("key of the built-in issuer: %w", err)
	}
	if err := b.publish(); err != nil {
		return nil, fmt.Errorf("key of the built-in issuer: %w", err)
	}
	return b, nil
}

// checkPublicURL is content with plain http: nobody fetches these keys to trust them here.
func checkPublicURL(raw string) error {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return fmt.Errorf("URL of the built-in issuer is %q: use this server's public address, like https://lock.example", raw)
	}
	return nil
}

func loadKey(file string) (*ecdsa.PrivateKey, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if block, _ := pem.Decode(raw); block != nil {
		parsed, _ := x509.ParsePKCS8PrivateKey(block.Bytes)
		if key, ok := parsed.(*ecdsa.PrivateKey); ok && key.Curve == elliptic.P256() {
			return key, nil
		}
	}
	return nil, fmt.Errorf("%s is not a P-256 private key (PKCS#8, PEM): restore it from a backup, "+
		"or move it away to have a new one made, which voids every token signed so far", file)
}

func createKey(file string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writeKey(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// writeKey leaves the whole of the key on disk, or nothing: half a key would stop every later start.
func writeKey(file string, content []byte) error {
	dir := filepath.Dir(file)
	temp, err := os.CreateTemp(dir, ".new-key-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // not there any more when all went well
	_, err = temp.Write(content)
	if err := errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp.Name(), file); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// publish prepares what others may know of the key.
func (b *BuiltIn) publish() error {
	public, err := jwkset.NewJWKFromKey(&b.key.PublicKey, jwkset.JWKOptions{})
	if err != nil {
		return err
	}
	jwk := public.Marshal()
	b.kid = thumbprint(jwk)
	jwk.KID, jwk.ALG, jwk.USE = b.kid, jwkset.AlgES256, jwkset.UseSig
	if b.jwks, err = json.Marshal(jwkset.JWKSMarshal{Keys: []jwkset.JWKMarshal{jwk}}); err != nil {
		return err
	}
	if b.keys, err = parseKeys(b.jwks); err != nil {
		return err
	}
	b.discovery, err = json.Marshal(metadataOf(b.url))
	return err
}

// thumbprint names a P-256 key by its content: RFC 7638, 3.
func thumbprint(k jwkset.JWKMarshal) string {
	sum := sha256.Sum256(fmt.Appendf(nil, `{"crv":%q,"kty":%q,"x":%q,"y":%q}`, k.CRV, k.KTY, k.X, k.Y))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// providerMetadata is what RFC 8414, 2 and OpenID Connect Discovery 1.0, 3 ask of an issuer that has
// no page to log in on.
type providerMetadata struct {
	Issuer        string   `json:"issuer"`
	JWKS          string   `json:"jwks_uri"`
	TokenEndpoint string   `json:"token_endpoint"`
	GrantTypes    []string `json:"grant_types_supported"`
	ClientAuth    []string `json:"token_endpoint_auth_methods_supported"`
	ResponseTypes []string `json:"response_types_supported"`
	SubjectTypes  []string `json:"subject_types_supported"`
	Algorithms    []string `json:"id_token_signing_alg_values_supported"`
}

func metadataOf(url string) providerMetadata {
	return providerMetadata{
		Issuer:        url,
		JWKS:          url + "/.well-known/jwks.json",
		TokenEndpoint: url + "/oauth/token",
		GrantTypes:    []string{"client_credentials"},
		ClientAuth:    []string{"client_secret_basic", "client_secret_post"},
		ResponseTypes: []string{},
		SubjectTypes:  []string{"public"},
		Algorithms:    []string{"ES256"},
	}
}

// URL is the iss of the tokens.
func (b *BuiltIn) URL() string { return b.url }

// JWKS is the JWK Set (RFC 7517) with the public key, as JSON. Don't change it.
func (b *BuiltIn) JWKS() []byte { return b.jwks }

// Discovery is the OpenID provider metadata, as JSON. Don't change it.
func (b *BuiltIn) Discovery() []byte { return b.discovery }

// User signs a token for a user, who is named by a lower-case UUID; anything else is an error.
func (b *BuiltIn) User(user string, ttl time.Duration, now time.Time) (token string, claims Claims, err error) {
	if !canonicalUUID(user) {
		return "", Claims{}, fmt.Errorf("user %q is not a lower-case UUID", user)
	}
	claims = b.claims(user, ttl, now)
	token, err = b.sign(claims, now)
	return token, claims, err
}

// Service signs an access token (RFC 9068) for a client that acts for an organisation. It is an
// error when either is empty, or a scope is empty or holds white space (it would read as several).
func (b *BuiltIn) Service(client, org string, scopes []string, ttl time.Duration, now time.Time) (string, Claims, error) {
	if client == "" || org == "" {
		return "", Claims{}, errors.New("a service token needs a client and an organisation")
	}
	if !slices.Equal(scopes, strings.Fields(strings.Join(scopes, " "))) {
		return "", Claims{}, fmt.Errorf("scopes %q: none may be empty or hold white space", scopes)
	}
	claims := b.claims(client, ttl, now)
	claims.Org, claims.Scopes = org, slices.Clone(scopes)
	token, err := b.sign(claims, now)
	return token, claims, err
}

func (b *BuiltIn) claims(subject string, ttl time.Duration, now time.Time) Claims {
	expires := now.Add(ttl).UTC().Truncate(time.Second) // exp has no fraction
	return Claims{Issuer: b.url, Subject: subject, ID: rand.Text(), Expires: expires}
}

func (b *BuiltIn) sign(c Claims, now time.Time) (string, error) {
	claims := jwt.MapClaims{
		"iss": c.Issuer, "aud": Audience, "sub": c.Subject, "jti": c.ID,
		"iat": now.Unix(), "exp": c.Expires.Unix(),
	}
	token := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
	token.Header["kid"] = b.kid
	if c.Org != "" {
		token.Header["typ"] = "at+jwt" // RFC 9068, 2.1
		claims["client_id"] = c.Subject
		claims["org_id"] = c.Org
		claims["scope"] = strings.Join(c.Scopes, " ")
	}
	return token.SignedString(b.key)
}
