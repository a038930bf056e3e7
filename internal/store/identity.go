package store

import (
	"context"
	"errors"
	"strings"
	"time"
)

var (
	// ErrExists says that the id is taken.
	ErrExists = errors.New("store: already exists")
	// ErrNoOrganization says that there is no such organisation.
	ErrNoOrganization = errors.New("store: no such organization")
)

// Organization is a tenant.
type Organization struct {
	ID         string
	Name       string
	OpenExpiry time.Duration // that an open of its locks lives; 0: the server's default
	CreatedAt  time.Time
}

// CredentialKind tells API keys from OAuth clients.
type CredentialKind string

// The kinds of credentials.
const (
	APIKey CredentialKind = "key"
	Client CredentialKind = "client"
)

// Credential is an API key or an OAuth client. The secret itself is not kept.
type Credential struct {
	ID        string
	Kind      CredentialKind
	Hash      []byte // SHA-256 of the secret
	Org       string
	Super     bool
	Name      string
	Scopes    []string
	CreatedAt time.Time
	ExpiresAt time.Time // zero: never
	RevokedAt time.Time // zero: not revoked
	UsedAt    time.Time // to a minute or so; zero: never
}

// Stands says whether the credential may be used at a moment.
func (c Credential) Stands(now time.Time) bool {
	return c.RevokedAt.IsZero() && (c.ExpiresAt.IsZero() || now.Before(c.ExpiresAt))
}

// CreateOrganization refuses with ErrExists.
func (db *DB) CreateOrganization(ctx context.Context, o Organization) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		var one int
		if err := tx.row(`SELECT 1 FROM organizations WHERE id = ?`, []any{o.ID}, &one); err == nil {
			return ErrExists
		} else if !errors.Is(err, ErrNotFound) {
			return err
		}
		return tx.exec(`INSERT INTO organizations (id, name, open_expiry, created_at) VALUES (?, ?, ?, ?)`,
			o.ID, o.Name, o.OpenExpiry.Milliseconds(), millis(o.CreatedAt))
	})
}

// SetOpenExpiry changes how long an open of an organization's locks lives.
// Refuses with ErrNotFound.
func (db *DB) SetOpenExpiry(ctx context.Context, org string, expiry time.Duration) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		var one int
		if err := tx.row(`SELECT 1 FROM organizations WHERE id = ?`, []any{org}, &one); err != nil {
			return err
		}
		return tx.exec(`UPDATE organizations SET open_expiry = ? WHERE id = ?`, expiry.Milliseconds(), org)
	})
}

const organizationColumns = `id, name, open_expiry, created_at`

// Organization refuses with ErrNotFound.
func (db *DB) Organization(ctx context.Context, id string) (Organization, error) {
	all, err := db.organizations(ctx, `SELECT `+organizationColumns+` FROM organizations WHERE id = ?`, id)
	if err == nil && len(all) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return Organization{}, err
	}
	return all[0], nil
}

// Organizations lists all of them by id.
func (db *DB) Organizations(ctx context.Context) ([]Organization, error) {
	return db.organizations(ctx, `SELECT `+organizationColumns+` FROM organizations ORDER BY id`)
}

func (db *DB) organizations(ctx context.Context, q string, args ...any) ([]Organization, error) {
	rows, err := db.query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	return scan(rows, func(o *Organization) error {
		var expiry, created int64
		err := rows.Scan(&o.ID, &o.Name, &expiry, &created)
		o.OpenExpiry, o.CreatedAt = time.Duration(expiry)*time.Millisecond, fromMillis(created)
		return err
	})
}

// CreateCredential refuses with ErrNoOrganization.
func (db *DB) CreateCredential(ctx context.Context, c Credential) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		return insertCredential(tx, c)
	})
}

// RotateCredential puts a new credential beside an old one and lets the old
// one end at a moment, in one step. Refuses with ErrNotFound.
func (db *DB) RotateCredential(ctx context.Context, old string, oldEnds time.Time, c Credential) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		var one int
		if err := tx.row(`SELECT 1 FROM credentials WHERE id = ? AND org = ? AND revoked_at IS NULL`, []any{old, c.Org}, &one); err != nil {
			return err
		}
		if err := tx.exec(`UPDATE credentials SET expires_at = min(coalesce(expires_at, ?1), ?1) WHERE id = ?2`, millis(oldEnds), old); err != nil {
			return err
		}
		return insertCredential(tx, c)
	})
}

func insertCredential(tx *tx, c Credential) error {
	var one int
	if err := tx.row(`SELECT 1 FROM organizations WHERE id = ?`, []any{c.Org}, &one); errors.Is(err, ErrNotFound) {
		return ErrNoOrganization
	} else if err != nil {
		return err
	}
	return tx.exec(`INSERT INTO credentials (id, kind, hash, org, super, name, scopes, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		c.ID, c.Kind, c.Hash, c.Org, c.Super, c.Name, strings.Join(c.Scopes, " "), millis(c.CreatedAt), nullable(c.ExpiresAt))
}

// RevokeCredential ends a credential of an organisation now and for good.
// Revoking it again changes nothing. Refuses with ErrNotFound.
func (db *DB) RevokeCredential(ctx context.Context, org, id string, now time.Time) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		var one int
		if err := tx.row(`SELECT 1 FROM credentials WHERE id = ? AND org = ?`, []any{id, org}, &one); err != nil {
			return err
		}
		return tx.exec(`UPDATE credentials SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL`, millis(now), id)
	})
}

// TouchCredentials notes when credentials were last used.
func (db *DB) TouchCredentials(ctx context.Context, used map[string]time.Time) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		for id, at := range used {
			if err := tx.exec(`UPDATE credentials SET used_at = max(coalesce(used_at, 0), ?) WHERE id = ?`, millis(at), id); err != nil {
				return err
			}
		}
		return nil
	})
}

const credentialColumns = `id, kind, hash, org, super, name, scopes, created_at,
	coalesce(expires_at, 0), coalesce(revoked_at, 0), coalesce(used_at, 0)`

// CredentialByHash finds a credential by the SHA-256 of its secret, also one
// that no longer stands. Refuses with ErrNotFound.
func (db *DB) CredentialByHash(ctx context.Context, hash []byte) (Credential, error) {
	return db.credential(ctx, `SELECT `+credentialColumns+` FROM credentials WHERE hash = ?`, hash)
}

// Credential finds a credential of an organisation by its id. Refuses with
// ErrNotFound.
func (db *DB) Credential(ctx context.Context, org, id string) (Credential, error) {
	return db.credential(ctx, `SELECT `+credentialColumns+` FROM credentials WHERE org = ? AND id = ?`, org, id)
}

func (db *DB) credential(ctx context.Context, q string, args ...any) (Credential, error) {
	all, err := db.credentials(ctx, q, args...)
	if err == nil && len(all) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return Credential{}, err
	}
	return all[0], nil
}

// Credentials lists an organisation's credentials of a kind, oldest first.
func (db *DB) Credentials(ctx context.Context, org string, kind CredentialKind) ([]Credential, error) {
	return db.credentials(ctx, `SELECT `+credentialColumns+` FROM credentials WHERE org = ? AND kind = ? ORDER BY created_at, id`, org, kind)
}

func (db *DB) credentials(ctx context.Context, q string, args ...any) ([]Credential, error) {
	rows, err := db.query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	return scan(rows, func(c *Credential) error {
		var scopes string
		var created, expires, revoked, used int64
		if err := rows.Scan(&c.ID, &c.Kind, &c.Hash, &c.Org, &c.Super, &c.Name, &scopes, &created, &expires, &revoked, &used); err != nil {
			return err
		}
		c.Scopes = strings.Fields(scopes)
		c.CreatedAt, c.ExpiresAt = fromMillis(created), fromMillis(expires)
		c.RevokedAt, c.UsedAt = fromMillis(revoked), fromMillis(used)
		return nil
	})
}

// SuspendUser makes every token of a user invalid from now on.
func (db *DB) SuspendUser(ctx context.Context, user string, now time.Time) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		return tx.exec(`INSERT OR IGNORE INTO suspended_users (user, suspended_at) VALUES (?, ?)`, user, millis(now))
	})
}

// ReactivateUser ends a suspension. It is no error if there is none.
func (db *DB) ReactivateUser(ctx context.Context, user string) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		return tx.exec(`DELETE FROM suspended_users WHERE user = ?`, user)
	})
}

// RevokeToken makes the token with a jti invalid from now on.
func (db *DB) RevokeToken(ctx context.Context, jti string, now time.Time) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		return tx.exec(`INSERT OR IGNORE INTO revoked_tokens (jti, revoked_at) VALUES (?, ?)`, jti, millis(now))
	})
}

// Revoked says whether a user is suspended or a token's jti revoked. Empty
// arguments are not asked about.
func (db *DB) Revoked(ctx context.Context, user, jti string) (bool, error) {
	var bad bool
	err := db.row(ctx, revokedQuery, []any{user, jti}, &bad)
	return bad, err
}

// AddCertificate notes the certificate that a device was enrolled with.
func (db *DB) AddCertificate(ctx context.Context, thing, serial string, now time.Time) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		return tx.exec(`INSERT INTO certificates (serial, thing, enrolled_at) VALUES (?, ?, ?)`, serial, thing, millis(now))
	})
}

// RevokeCertificates makes every certificate that a thing has now invalid.
// Refuses with ErrNotFound when it has none.
func (db *DB) RevokeCertificates(ctx context.Context, thing string, now time.Time) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		var one int
		if err := tx.row(`SELECT 1 FROM certificates WHERE thing = ? AND revoked_at IS NULL LIMIT 1`, []any{thing}, &one); err != nil {
			return err
		}
		return tx.exec(`UPDATE certificates SET revoked_at = ? WHERE thing = ? AND revoked_at IS NULL`, millis(now), thing)
	})
}

// RevokedCertificates are the serial numbers of all revoked certificates.
func (db *DB) RevokedCertificates(ctx context.Context) (revoked map[string]bool, err error) {
	rows, err := db.query(ctx, `SELECT serial FROM certificates WHERE revoked_at IS NOT NULL`)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	revoked = map[string]bool{}
	for rows.Next() {
		var serial string
		if err := rows.Scan(&serial); err != nil {
			return nil, err
		}
		revoked[serial] = true
	}
	return revoked, rows.Err()
}

func nullable(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return millis(t)
}
