// Package auth finds out who is calling: JWTs of external issuers and of the
// built-in one, API keys and OAuth clients. It makes a Principal, whose rights
// access judges. It never falls back from a bad credential to another, and no
// credential is ever in an error or a log.
package auth

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/store"
)

// ErrUnauthenticated says that a caller is not known: no credential, or one
// that is wrong in any way. The text after it tells the caller what to do and
// never repeats a credential.
var ErrUnauthenticated = errors.New("not authenticated")

// Principal is who is calling, with which rights, as the credentials of one
// request have shown.
type Principal struct {
	access.Subject                // whose rights are used
	Actor          string         // who it is, as recorded: "user:<uuid>", "service:<id>", "org:<id>", "operator"
	Credential     string         // which credentials, by name: "key:<id>", "jwt:<issuer>#<jti>"
	Standing       store.Standing // what must still be true when something is recorded
}

// Caller names the caller across credentials: organisation and actor.
func (p Principal) Caller() string {
	if p.Super {
		return OperatorOrg + "|" + p.Actor
	}
	return p.Org + "|" + p.Actor
}

// Authenticator makes principals out of requests.
type Authenticator struct {
	db      *store.DB
	issuers *Issuers
	builtin *BuiltIn
	clock   clock.Clock

	mu   sync.Mutex
	used map[string]time.Time // credentials since the last Flush
}

// NewAuthenticator joins API keys, kept in the database, and tokens of the
// issuers.
func NewAuthenticator(db *store.DB, issuers *Issuers, builtin *BuiltIn, c clock.Clock) *Authenticator {
	return &Authenticator{db: db, issuers: issuers, builtin: builtin, clock: c, used: map[string]time.Time{}}
}

// Request finds out who sends a request. A key, a token or both may come; what
// comes must be valid. With both, the key decides organisation and rights, and
// the token names the actor. Refuses with ErrUnauthenticated.
func (a *Authenticator) Request(r *http.Request) (Principal, error) {
	key, token, err := credentials(r.Header)
	if err != nil {
		return Principal{}, err
	}
	var byKey, byToken Principal
	if key != "" {
		if byKey, err = a.Key(r.Context(), key); err != nil {
			return Principal{}, err
		}
	}
	if token != "" {
		if byToken, err = a.token(r.Context(), token); err != nil {
			return Principal{}, err
		}
	}
	switch {
	case token == "":
		return byKey, nil
	case key == "":
		return byToken, nil
	}
	return join(byKey, byToken)
}

// credentials takes the two out of a header. What is there but malformed is
// refused: there is no falling back from one to the other.
func credentials(h http.Header) (key, token string, err error) {
	keys, tokens := h.Values("X-API-Key"), h.Values("Authorization")
	if len(keys) > 1 || len(tokens) > 1 {
		return "", "", unauthenticated("send each of X-API-Key and Authorization at most once")
	}
	if len(keys) == 0 && len(tokens) == 0 {
		return "", "", unauthenticated("send an API key in X-API-Key, a JWT in Authorization: Bearer, or both")
	}
	if len(keys) == 1 {
		if key = keys[0]; key == "" {
			return "", "", unauthenticated("the X-API-Key header is empty")
		}
	}
	if len(tokens) == 1 {
		scheme, rest, _ := strings.Cut(tokens[0], " ")
		if token = strings.TrimSpace(rest); !strings.EqualFold(scheme, "Bearer") || token == "" {
			return "", "", unauthenticated("the Authorization header must be: Bearer <JWT>")
		}
	}
	return key, token, nil
}

// join lets the key decide and the token name the actor.
func join(key, token Principal) (Principal, error) {
	if token.Org != "" && token.Org != key.Org {
		return Principal{}, unauthenticated("the token is for another organization than the API key")
	}
	return Principal{
		Subject:    key.Subject,
		Actor:      token.Actor,
		Credential: key.Credential + " " + token.Credential,
		Standing: store.Standing{
			Credentials: append(key.Standing.Credentials, token.Standing.Credentials...),
			User:        token.Standing.User,
			Token:       token.Standing.Token,
			Expires:     token.Standing.Expires,
		},
	}, nil
}

// Key makes a principal of an API key. Whatever is wrong with it, looking it
// up costs one hash and one look-up. Refuses with ErrUnauthenticated.
func (a *Authenticator) Key(ctx context.Context, key string) (Principal, error) {
	c, err := a.secret(ctx, store.APIKey, key)
	if err != nil {
		return Principal{}, err
	}
	p := Principal{
		Subject:    access.Subject{Org: c.Org, Scopes: scopes(c.Scopes)},
		Actor:      "org:" + c.Org,
		Credential: "key:" + c.ID,
		Standing:   store.Standing{Credentials: []string{c.ID}},
	}
	if c.Super {
		p.Subject, p.Actor = access.Subject{Super: true}, "operator"
	}
	return p, nil
}

// Client finds the OAuth client that has an id and a secret. Refuses with
// ErrUnauthenticated.
func (a *Authenticator) Client(ctx context.Context, id, secret string) (store.Credential, error) {
	c, err := a.secret(ctx, store.Client, secret)
	if err == nil && c.ID != id {
		err = unauthenticated("client id and secret do not match")
	}
	return c, err
}

func (a *Authenticator) secret(ctx context.Context, kind store.CredentialKind, secret string) (store.Credential, error) {
	hash := sha256.Sum256([]byte(secret))
	c, err := a.db.CredentialByHash(ctx, hash[:])
	if errors.Is(err, store.ErrNotFound) || err == nil && (c.Kind != kind || !c.Stands(a.clock.Wall())) {
		return store.Credential{}, unauthenticated("the API key or client secret is unknown, expired or revoked")
	}
	if err != nil {
		return store.Credential{}, err
	}
	a.mu.Lock()
	a.used[c.ID] = a.clock.Wall()
	a.mu.Unlock()
	return c, nil
}

func (a *Authenticator) token(ctx context.Context, raw string) (Principal, error) {
	claims, err := a.issuers.Verify(ctx, raw)
	if errors.Is(err, ErrToken) {
		return Principal{}, fmt.Errorf("%w: %w", ErrUnauthenticated, err)
	}
	if err != nil {
		return Principal{}, err
	}
	p := a.ofClaims(claims)
	revoked, err := a.db.Revoked(ctx, p.Standing.User, p.Standing.Token)
	if err == nil && !revoked {
		err = a.clientStands(ctx, claims, p)
	}
	if err == nil && revoked {
		err = unauthenticated("the token was revoked or its user is suspended")
	}
	return p, err
}

func (a *Authenticator) ofClaims(c Claims) Principal {
	p := Principal{
		Credential: "jwt:" + c.Issuer + "#" + c.ID,
		Standing:   store.Standing{Token: c.ID, Expires: c.Expires.Add(leeway)},
	}
	if c.Org == "" {
		p.Subject, p.Actor = access.Subject{User: c.Subject}, "user:"+c.Subject
		p.Standing.User = c.Subject
		return p
	}
	p.Subject = access.Subject{Org: c.Org, Scopes: scopes(c.Scopes)}
	p.Actor = "service:" + c.Subject
	if c.Issuer == a.builtin.URL() {
		p.Standing.Credentials = []string{c.Subject} // a token dies with the client it was given to
	}
	return p
}

func (a *Authenticator) clientStands(ctx context.Context, c Claims, p Principal) error {
	for _, id := range p.Standing.Credentials {
		client, err := a.db.Credential(ctx, c.Org, id)
		if errors.Is(err, store.ErrNotFound) || err == nil && !client.Stands(a.clock.Wall()) {
			return unauthenticated("the client that the token was given to is revoked or expired")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Flush notes durably which credentials were used since the last time.
func (a *Authenticator) Flush(ctx context.Context) error {
	a.mu.Lock()
	used := a.used
	a.used = map[string]time.Time{}
	a.mu.Unlock()
	if len(used) == 0 {
		return nil
	}
	return a.db.TouchCredentials(ctx, used)
}

func scopes(names []string) []access.Scope {
	all := make([]access.Scope, len(names))
	for i, n := range names {
		all[i] = access.Scope(n)
	}
	return all
}

func unauthenticated(what string) error { return fmt.Errorf("%w: %s", ErrUnauthenticated, what) }
